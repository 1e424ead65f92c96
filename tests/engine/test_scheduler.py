"""Which sequences run next: chunks, room, turns between owners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veriattn.engine.scheduler import Scheduler, Sequence
from veriattn.spec.forward import Batch
from veriattn.spec.sampler import SamplingParams


def sequence(seq_id: int, prompt: int = 4, max_tokens: int = 4, owner: str = "") -> Sequence:
    return Sequence(seq_id, tuple(range(prompt)), SamplingParams(), max_tokens, owner=owner)


def run(scheduler: Scheduler, sequences: dict[int, Sequence]) -> list[tuple[int, int, int]]:
    """One step as an engine does it; (id, start, tokens) of its runs."""
    batch = scheduler.next_batch()
    assert isinstance(batch, Batch)
    for e in batch.entries:
        seq = sequences[e.seq_id]
        if e.logits == "last":
            seq.output_ids.append(7)
            if len(seq.output_ids) == seq.max_tokens:
                assert scheduler.remove(seq)
    return [(e.seq_id, e.start, e.num_tokens) for e in batch.entries]


def filled(scheduler: Scheduler, *sequences: Sequence) -> dict[int, Sequence]:
    for s in sequences:
        scheduler.add(s)
    return {s.seq_id: s for s in sequences}


def test_decoding_goes_first_and_prompts_come_in_chunks() -> None:
    scheduler = Scheduler(5, 8, 100)
    all_ = filled(scheduler, sequence(0, prompt=3), sequence(1, prompt=9))
    assert run(scheduler, all_) == [(0, 0, 3), (1, 0, 2)]
    assert run(scheduler, all_) == [(0, 3, 1), (1, 2, 4)]
    assert run(scheduler, all_) == [(0, 4, 1), (1, 6, 3)]
    assert run(scheduler, all_) == [(0, 5, 1), (1, 9, 1)]
    assert run(scheduler, all_) == [(1, 10, 1)]


def test_a_budget_below_the_batch_starves_nobody() -> None:
    scheduler = Scheduler(2, 8, 100)
    all_ = filled(scheduler, *(sequence(i, prompt=1) for i in range(3)))
    served = [i for _ in range(6) for i, *_ in run(scheduler, all_)]
    assert sorted(served) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert all(set(served[k : k + 3]) == {0, 1, 2} for k in range(0, 9, 3))


def test_room_is_reserved_for_whole_answers_and_the_turn_is_kept() -> None:
    scheduler = Scheduler(64, 8, 20)
    all_ = filled(scheduler, sequence(0), sequence(1, prompt=10, max_tokens=8, owner="a"), sequence(2, owner="b"))
    # 8 of 20 are taken, the second needs 18: the third does not slip past it, though it would fit.
    for _ in range(4):
        assert [i for i, *_ in run(scheduler, all_)] == [0]
    scheduler.add(sequence(3, owner="c"))
    assert [i for i, *_ in run(scheduler, all_)] == [1]
    assert not scheduler.fits(sequence(9, prompt=17))


def test_owners_take_turns() -> None:
    scheduler = Scheduler(64, 2, 1000)
    first = [sequence(i, max_tokens=1, owner="a") for i in range(4)]
    all_ = filled(scheduler, *first, *(sequence(10 + i, max_tokens=1, owner="b") for i in range(2)))
    steps = [sorted(i for i, *_ in run(scheduler, all_)) for _ in range(3)]
    assert steps == [[0, 10], [1, 11], [2, 3]]


def test_owners_take_turns_for_a_single_place() -> None:
    scheduler = Scheduler(64, 1, 1000)
    owners = "aaabbc"
    all_ = filled(scheduler, *(sequence(i, max_tokens=1, owner=o) for i, o in enumerate(owners)))
    assert [owners[run(scheduler, all_)[0][0]] for _ in owners] == ["a", "b", "c", "a", "b", "a"]


def test_one_owner_is_served_in_order() -> None:
    scheduler = Scheduler(64, 1, 1000)
    all_ = filled(scheduler, *(sequence(i, max_tokens=1) for i in range(5)))
    assert [run(scheduler, all_)[0][0] for _ in range(5)] == [0, 1, 2, 3, 4]


def test_after_a_fault_everything_is_computed_again() -> None:
    scheduler = Scheduler(64, 8, 100)
    all_ = filled(scheduler, sequence(0))
    run(scheduler, all_)
    run(scheduler, all_)
    scheduler.requeue_all()
    assert run(scheduler, all_) == [(0, 0, 6)]


def test_who_leaves_while_it_has_the_turn_blocks_nobody() -> None:
    scheduler = Scheduler(64, 8, 10)
    large = sequence(1, prompt=9, max_tokens=1)
    all_ = filled(scheduler, sequence(0), large, sequence(2, prompt=1, max_tokens=1))
    assert [i for i, *_ in run(scheduler, all_)] == [0]
    assert not scheduler.remove(large)
    assert [i for i, *_ in run(scheduler, all_)] == [0, 2]


@pytest.mark.parametrize("max_sequences", [1, 3])
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.sampled_from("abc")), min_size=1, max_size=12),
    st.integers(1, 8),
)
def test_everyone_ends_within_the_bounds(max_sequences: int, wanted: list[tuple[int, int, str]], budget: int) -> None:
    scheduler = Scheduler(budget, max_sequences, 20)
    all_ = filled(scheduler, *(sequence(i, *w) for i, w in enumerate(wanted)))
    left = sum(prompt + max_tokens - 1 for prompt, max_tokens, _ in wanted)
    while scheduler.waiting or scheduler.running:
        runs = run(scheduler, all_)
        tokens = sum(n for *_, n in runs)
        assert 0 < tokens <= budget and len(runs) <= max_sequences
        left -= tokens
    assert left == 0
    assert all(len(s.output_ids) == s.max_tokens for s in all_.values())
