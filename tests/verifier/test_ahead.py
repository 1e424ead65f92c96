"""A prover that is told of the next batch while this one is being checked: same bits, same checks, and when it is not told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.verifier.shares import FLOWS, MakeSink, ThreadProver, Truth, same, settings, steps

from veriattn.errors import ConfigError, FreivaldsMismatch, InternalError, ProverUnavailable, UsageError
from veriattn.prover.serve import ChannelSink
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.reference import F32
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session
from veriattn.verifier.steps import AHEAD_BYTES, Steps
from veriattn.wire.channel import Channel
from veriattn.wire.messages import HEADER_BYTES, AttentionCheck, Kind, Mode, step_bytes

SCRIPT = ((50, 9, 4), 13, 3)  # lengths, chunk, decode steps
ALL_FLOWS = (*FLOWS, Flow.UNVERIFIED)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> VerifierModel:
    return VerifierModel(tiny_model)


@pytest.fixture(scope="module")
def truth(tiny_model: Path) -> list[F32]:
    return Truth(tiny_model)(*SCRIPT)


def open_session(model: VerifierModel, flow: Flow, make_sink: MakeSink = ChannelSink, **changes: Any) -> Session:
    return Session(model, lambda m: ThreadProver(m.path, make_sink), settings(**changes), flow)


def one(seq_id: int, start: int, count: int, logits: Any = "last") -> Batch:
    return Batch((BatchEntry(seq_id, start, tuple(4 + (start + i) % 300 for i in range(count)), logits),))


def play_ahead(session: Session, batches: list[Batch]) -> list[F32]:
    with session:
        return [session.run(b, following) for b, following in zip(batches, [*batches[1:], None], strict=True)]


@pytest.mark.parametrize("flow", ALL_FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("capacity", [None, 0, 20, 30])
def test_the_same_logits(model: VerifierModel, truth: list[F32], flow: Flow, capacity: int | None) -> None:
    """The whole script is known beforehand here. With 20 keys at the prover a chunk is cut in two, the second part shared."""
    if flow is Flow.UNVERIFIED and capacity is not None:
        capacity = None
    session = open_session(model, flow, prover_kv_tokens=capacity, offload_ratio=None if capacity is None else 0.5)
    assert same(play_ahead(session, steps(*SCRIPT)), truth)


@pytest.mark.parametrize("check", ["transfer", "auto"])
def test_the_check_is_chosen_when_the_prover_is_told(model: VerifierModel, truth: list[F32], check: Any) -> None:
    chosen = check if check == "auto" else AttentionCheck.TRANSFER
    assert same(play_ahead(open_session(model, Flow.RUN_AHEAD, attention_check=chosen), steps(*SCRIPT)), truth)


def test_a_process_over_shared_memory(model: VerifierModel, truth: list[F32]) -> None:
    assert same(play_ahead(Session(model, ChildProver, settings()), steps(*SCRIPT)), truth)


def test_the_prover_is_told_at_once_and_once(model: VerifierModel) -> None:
    first, second, third = one(0, 0, 10, "none"), one(0, 10, 5, "none"), one(0, 15, 1)
    step = [HEADER_BYTES + step_bytes(1, n) for n in (10, 5, 1)]
    with open_session(model, Flow.RUN_AHEAD) as session:
        before = session.channel.bytes_sent
        session.run(first, second)
        assert session.channel.bytes_sent - before == step[0] + step[1]
        assert session.length(0) == 10, "what has not been checked does not count"
        session.run(second)
        assert session.channel.bytes_sent - before == step[0] + step[1]
        session.run(third)
        assert session.channel.bytes_sent - before == sum(step)
        assert session.length(0) == 16 and session.stats.steps == 3


def test_the_prover_computes_ahead(model: VerifierModel) -> None:
    """It sends the next batch's first claim while nobody has looked at it."""
    began = threading.Event()

    class Sink(ChannelSink):
        seen = 0

        def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
            if name == "layers.0.qkv":
                Sink.seen += 1
                if Sink.seen == 2:
                    began.set()
            super().claim(name, values)

    with open_session(model, Flow.RUN_AHEAD, Sink) as session:
        session.run(one(0, 0, 10, "none"), one(0, 10, 5))
        assert began.wait(60)
        assert session.run(one(0, 10, 5)).shape == (1, model.tensors.config.vocab_size)


def test_a_lie_ahead_is_caught_in_its_turn(model: VerifierModel) -> None:
    """What was checked before it stays checked; nothing of its own batch comes out."""

    class Sink(ChannelSink):
        def __init__(self, channel: Channel) -> None:
            super().__init__(channel)
            self.seen = 0

        def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
            if name == "layers.1.down":
                self.seen += 1
                if self.seen == 2:
                    values = values.copy()
                    values.reshape(-1)[3] += 1
            super().claim(name, values)

    session = open_session(model, Flow.RUN_AHEAD, Sink)
    with session:
        assert session.run(one(0, 0, 10, "none"), one(0, 10, 5)).shape[0] == 0
        assert session.length(0) == 10
        with pytest.raises(FreivaldsMismatch) as caught:
            session.run(one(0, 10, 5))
        assert caught.value.operation == "layers.1.down" and caught.value.sequences == frozenset({0})
        assert session.closed and session.length(0) == 10


def test_claims_of_the_step_ahead_do_not_pass_for_those_at_hand(model: VerifierModel) -> None:
    """Both chunks have the same sizes, so that nothing but the values can tell; an honest twin of the same prover passes."""
    chunks = one(0, 0, 8, "none"), one(0, 8, 8, "none")

    def first_error(swapped: bool) -> FreivaldsMismatch | None:
        held: list[tuple[str, np.ndarray[Any, Any]]] = []
        per_step = 5 * model.tensors.config.num_layers

        class Sink(ChannelSink):
            def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
                held.append((name, values.copy()))
                if len(held) == 2 * per_step:
                    halves = held[:per_step], held[per_step:]
                    for claim in halves[1] + halves[0] if swapped else halves[0] + halves[1]:
                        super().claim(*claim)

        with open_session(model, Flow.RUN_AHEAD, Sink) as session:
            try:
                session.run(*chunks)
                session.run(chunks[1])
            except FreivaldsMismatch as error:
                assert session.length(0) == 0
                return error
            return None

    assert first_error(swapped=False) is None
    error = first_error(swapped=True)
    assert error is not None and error.operation == "layers.0.qkv"


def test_another_batch_than_announced_ends_the_session(model: VerifierModel) -> None:
    with open_session(model, Flow.RUN_AHEAD) as session:
        session.run(one(0, 0, 10, "none"), one(0, 10, 5))
        with pytest.raises(InternalError, match="another batch"):
            session.run(one(0, 10, 6))
        with pytest.raises(ProverUnavailable):
            session.run(one(0, 10, 5))


def test_nothing_is_freed_while_the_prover_is_ahead(model: VerifierModel) -> None:
    with open_session(model, Flow.RUN_AHEAD) as session:
        session.run(one(1, 0, 3))
        session.run(one(0, 0, 10, "none"), one(0, 10, 5))
        with pytest.raises(InternalError, match="freed"):
            session.free(1)
        assert session.closed


@pytest.mark.parametrize(
    ("following", "error"),
    [
        (one(0, 11, 5), InternalError),  # does not continue
        (one(0, 10, 4096 + 1), InternalError),  # beyond the limits of a step
        (Batch((BatchEntry(0, 10, (10**6,)),)), InternalError),  # no such token
        (Batch(tuple(BatchEntry(s, 0, (5,)) for s in range(1, 9))), UsageError),  # more sequences than there may be
    ],
)
def test_what_can_never_follow_is_refused(model: VerifierModel, following: Batch, error: type[Exception]) -> None:
    with open_session(model, Flow.RUN_AHEAD) as session, pytest.raises(error):
        session.run(one(0, 0, 10, "none"), following)


def told_early(session: Session, first: Batch, second: Batch) -> bool:
    """Run both; whether the second STEP left with the first."""
    session.run(first, second)
    before = session.channel.bytes_sent
    session.run(second)
    return session.channel.bytes_sent == before


def test_not_told_while_attention_is_shared(model: VerifierModel) -> None:
    """There the prover waits for blocks and sums of the step at hand, and would take a STEP for one."""
    with open_session(model, Flow.RUN_AHEAD, prover_kv_tokens=10, offload_ratio=0.0) as session:
        assert told_early(session, one(0, 0, 6, "none"), one(0, 6, 4, "none"))
        assert not told_early(session, one(0, 10, 3, "none"), one(0, 13, 2))
        assert session.run(one(1, 0, 4, "none"), one(1, 4, 9)).shape[0] == 0  # the next one is cut: half of it is told
        assert session.run(one(1, 4, 9)).shape[0] == 1


def test_not_told_of_what_might_not_fit_the_link(model: VerifierModel) -> None:
    count = (AHEAD_BYTES - step_bytes(1, 0)) // 4
    with open_session(model, Flow.UNVERIFIED, max_tokens_per_step=1 << 14) as session:
        fits, large = (Batch((BatchEntry(0, 4, (5,) * n, "none"),)) for n in (count, count + 1))
        assert session._steps.may_precede(session._steps.begin(one(0, 0, 4, "none"), {}), fits)
        assert not session._steps.may_precede(session._steps.begin(one(1, 0, 4, "none"), {}), large)


class Sent:
    """A channel that notes the sizes of what is sent."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def send(self, kind: Kind, payload: bytes) -> None:
        assert kind is Kind.STEP
        self.sizes.append(len(payload))


@pytest.mark.parametrize("more", [0, 1])
def test_the_second_part_of_a_cut_batch_is_told_in_its_turn_where_it_might_not_fit(more: int) -> None:
    """Its prover may be busy with the first part's claims, which nobody takes while the second STEP is being sent."""
    count = (AHEAD_BYTES - step_bytes(1, 0)) // 4 + more
    channel, limits = Sent(), {7: 10}
    told = Steps(cast(Channel, channel), Mode.CLAIMS, AttentionCheck.REPLAY)
    begun = told.begin(Batch((BatchEntry(7, 0, (5,) * (10 + count)),)), limits)
    both = [step_bytes(1, 10), step_bytes(1, count)]
    assert channel.sizes == (both[:1] if more else both)
    told.reach(begun, 0, limits)
    assert channel.sizes == (both[:1] if more else both)
    told.reach(begun, 1, limits)
    assert channel.sizes == both and begun.told == 2


def test_not_told_of_what_memory_has_no_room_for(model: VerifierModel) -> None:
    """The first batch runs; the second is refused in its turn, with nothing changed, and what fits goes on."""
    c = model.tensors.config
    page = 256 * c.num_layers * c.num_kv_heads * (c.head_dim + 4 + 16)
    with open_session(model, Flow.RUN_AHEAD, tee_memory_bytes=2 * page) as session:
        assert told_early(session, one(0, 0, 200, "none"), one(0, 200, 50, "none"))
        sent = session.channel.bytes_sent
        session.run(one(0, 250, 100, "none"), one(1, 0, 300))
        assert session.channel.bytes_sent - sent == HEADER_BYTES + step_bytes(1, 100)
        with pytest.raises(ConfigError, match="the limit is"):
            session.run(one(1, 0, 300))
        session.run(one(0, 350, 100))
        assert session.length(0) == 450
