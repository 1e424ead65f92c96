"""Split attention: the same bits for every capacity, ratio, batch, chunk and tile; what was where, and what crossed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.verifier.shares import FLOWS, ThreadProver, Truth, play, same, settings, steps, tokens

from veriattn.errors import ConfigError, UsageError
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.kv import PAGE
from veriattn.trace import Trace
from veriattn.verifier import split as verifier_split
from veriattn.verifier import tiling
from veriattn.verifier.launch import ChildProver, RemoteProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.verifier.steps import cut_at_limits
from veriattn.wire.messages import HEADER_BYTES

#: A batch of one and of five. The first is longer than the largest limit by so much that 0.3 of it is a block.
LENGTHS = {1: (2900,), 5: (2900, 20, 310, 64, 257)}
SHORT = {1: (1300,), 5: (1300, 20, 310, 64, 257)}
CHUNK, DECODE = 1450, 3
#: Every capacity with every ratio, alone or with others: by flow, so that all flows meet both.
COMBINATIONS = [(c, p) for c in (0, 64, 2000, None) for p in (0.0, 0.3, 1.0, None)]


@pytest.fixture(scope="module")
def long_model(make_model: Callable[..., Path]) -> VerifierModel:
    return VerifierModel(make_model(max_positions=4096))


@pytest.fixture(scope="module")
def long_truth(long_model: VerifierModel) -> Truth:
    return Truth(long_model.path)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> VerifierModel:
    return VerifierModel(tiny_model)


@pytest.fixture(scope="module")
def truth(tiny_model: Path) -> Truth:
    return Truth(tiny_model)


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "ratio"), COMBINATIONS)
@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_the_same_bits_for_every_capacity_and_ratio(
    long_model: VerifierModel, long_truth: Truth, flow: Flow, capacity: int | None, ratio: float | None
) -> None:
    batch = 5 if COMBINATIONS.index((capacity, ratio)) % 3 == FLOWS.index(flow) else 1
    config = settings(prover_kv_tokens=capacity, offload_ratio=ratio)
    session = Session(long_model, lambda m: ThreadProver(m.path), config, flow)
    got = play(session, steps(LENGTHS[batch], CHUNK, DECODE))
    assert same(got, long_truth(LENGTHS[batch], CHUNK, DECODE))
    if capacity is None:
        assert session.split is None
        return
    assert session.split is not None
    stats = session.split.stats
    assert (stats.prover_tokens > 0) == (capacity > 0)
    if flow is Flow.TSDP:
        assert stats.streamed_tokens > 0 and stats.tee_tokens == 0
    else:
        assert stats.tee_tokens > 0
        assert (stats.streamed_tokens > 0) == (ratio != 0.0)
        assert stats.streamed_tokens % PAGE == 0


@pytest.mark.parametrize("chunk", [37, 300, 900])
@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_the_same_bits_for_every_chunk(model: VerifierModel, truth: Truth, flow: Flow, chunk: int) -> None:
    config = settings(prover_kv_tokens=50, offload_ratio=0.6)
    got = play(Session(model, lambda m: ThreadProver(m.path), config, flow), steps((900,), chunk, 2))
    assert same(got[-2:], truth((900,), 900, 2)[-2:])


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("rows", [1, 100])
def test_the_same_bits_for_every_tile_of_rows(
    model: VerifierModel, truth: Truth, flow: Flow, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of a tile stay below a bound; a run that has more goes in several exchanges."""
    keys, sizes = 641, []
    monkeypatch.setattr(tiling, "SCORE_BYTES", 4 * model.tensors.config.num_heads * keys * rows)
    receive = verifier_split.SplitAttention._receive

    def note(self: verifier_split.SplitAttention, out: np.ndarray[Any, Any]) -> None:
        if out.dtype == np.int32:
            sizes.append(out.nbytes)
        receive(self, out)

    monkeypatch.setattr(verifier_split.SplitAttention, "_receive", note)
    config = settings(prover_kv_tokens=40, offload_ratio=0.7)
    session = Session(model, lambda m: ThreadProver(m.path), config, flow)
    assert same(play(session, steps((640, 64), 320, 1)), truth((640, 64), 320, 1))
    # Keys are counted once a run: three of the first sequence beyond the limit, two of the second.
    assert session.split is not None
    stats = session.split.stats
    assert stats.prover_tokens == 5 * 40
    assert stats.prover_tokens + stats.streamed_tokens + stats.tee_tokens == 320 + 640 + 641 + 64 + 65
    assert max(sizes) <= tiling.SCORE_BYTES
    assert len(sizes) > (500 if rows == 1 else 12)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("link", ["ring", "tcp"])
def test_processes(model: VerifierModel, truth: Truth, listening_prover: str, flow: Flow, link: str) -> None:
    def launch(m: VerifierModel) -> ChildProver | RemoteProver:
        return ChildProver(m, threads=1) if link == "ring" else RemoteProver(listening_prover)

    session = Session(model, launch, settings(prover_kv_tokens=64, prover_kv_total=200, offload_ratio=0.5), flow)
    assert same(play(session, steps(SHORT[5], 640, 3)), truth(SHORT[5], 640, 3))


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_challenges_outlive_the_steps_that_use_all_of_them(model: VerifierModel, flow: Flow) -> None:
    """What a step keeps of the challenges is overwritten after it; the session's own are not, whatever the length."""
    keys: set[int] = set()
    config = settings(prover_kv_tokens=500, offload_ratio=1.0)
    with Session(model, lambda m: ThreadProver(m.path), config, flow) as session:
        assert session._checker is not None
        for batch in (
            Batch((BatchEntry(0, 0, tuple(tokens(0, 1024))),)),
            *(Batch((BatchEntry(0, n, (5,)),)) for n in range(1024, 1027)),
        ):
            session.run(batch)
            challenges = session._checker.keys.positions(0)
            keys.add(challenges.shape[1])
            assert np.all(challenges != 0)
    assert 1024 in keys


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_a_total_is_shared_first_come_first_served_and_comes_back(model: VerifierModel) -> None:
    config = settings(prover_kv_tokens=40, prover_kv_total=60, offload_ratio=0.0)
    with Session(model, lambda m: ThreadProver(m.path), config) as session:
        session.run(Batch(tuple(BatchEntry(s, 0, tuple(tokens(s, 5))) for s in range(3))))
        assert session.split is not None and session.split.limits == {0: 40, 1: 20, 2: 0}
        session.free(0)
        session.run(Batch((BatchEntry(3, 0, tuple(tokens(3, 5))),)))
        assert session.split.limits == {1: 20, 2: 0, 3: 40}


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_capacity_that_comes_back_is_used_again(model: VerifierModel, truth: Truth, flow: Flow) -> None:
    """The same id and its pages, another text, and the bits of a fresh sequence."""
    config = settings(prover_kv_tokens=100, prover_kv_total=100, offload_ratio=0.5)
    other = tuple(reversed(tokens(0, 900)))
    with Session(model, lambda m: ThreadProver(m.path), config, flow) as session:
        session.run(Batch((BatchEntry(0, 0, other),)))
        assert session.split is not None
        before = session.kv_bytes
        for seq_id in (0, 1):
            session.free(seq_id)
            got = session.run(Batch((BatchEntry(1 - seq_id, 0, tuple(tokens(0, 900))),)))
            assert np.array_equal(got, truth((900,), 900, 0)[0])
            assert session.split.limits == {1 - seq_id: 100}
        assert session.kv_bytes == before


def test_the_prover_is_told_no_more_than_its_capacity(model: VerifierModel) -> None:
    """It can size its memory by what HELLO says."""
    for changes, expected in (
        ({"prover_kv_tokens": 30}, 240),
        ({"prover_kv_total": 70}, 70),
        ({"prover_kv_tokens": 0}, 1),
        ({"prover_kv_tokens": 10**7}, 1 << 20),
        ({}, 1 << 20),
    ):
        session = Session(model, lambda m: ThreadProver(m.path), settings(**changes))
        with session:
            assert session._limits.kv_tokens == expected


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_a_capacity_beyond_all_bounds_is_none(model: VerifierModel, truth: Truth, flow: Flow) -> None:
    config = settings(prover_kv_tokens=10**12, prover_kv_total=10**15)
    session = Session(model, lambda m: ThreadProver(m.path), config, flow)
    assert same(play(session, steps((300, 20), 300, 1)), truth((300, 20), 300, 1))
    assert session.split is not None and session.split.stats.ratios == []


def test_nothing_is_limited_where_nothing_is_shared(model: VerifierModel) -> None:
    with pytest.raises(UsageError, match="no keys outside"):
        Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=4), Flow.UNVERIFIED)


# --- what crosses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 100, 600])
def test_tsdp_moves_all_other_keys_in_every_step(model: VerifierModel, capacity: int) -> None:
    """As published: with C keys on the GPU, the n - C others cross in every step and layer. Bytes as on paper."""
    c, n = model.tensors.config, 900
    heads, kv, d = c.num_heads, c.num_kv_heads, c.head_dim
    linears = sum(inp for inp, _ in ((inp, out) for out, inp in c.linear_shapes().values()))
    outs = sum(out for out, _ in c.linear_shapes().values())
    linear_count = len(c.linear_shapes())
    with Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=capacity), Flow.TSDP) as session:
        session.run(Batch((BatchEntry(0, 0, tuple(tokens(0, n))),)))
        for step in range(3):
            before = session.channel.bytes_sent, session.channel.bytes_received
            session.run(Batch((BatchEntry(0, n + step, (5,)),)))
            sent = session.channel.bytes_sent - before[0]
            received = session.channel.bytes_received - before[1]
            keys = n + step + 1
            beyond = keys - capacity
            blocks = -(-beyond // PAGE)
            # Keys and values as int8, a scale for each key and head: the paper's KV traffic at one byte per element.
            moved = beyond * kv * (2 * d + 4)
            per_layer = 32 + heads * (d + 4) + moved + 2 * 16 * blocks + 2 * heads * keys
            assert sent == c.num_layers * (per_layer + HEADER_BYTES * (2 + 2 * blocks)) + linears + linear_count * (
                16 + HEADER_BYTES
            )
            assert received == 4 * outs + linear_count * HEADER_BYTES + c.num_layers * (
                4 * heads * keys + 8 * heads * d + 2 * HEADER_BYTES
            )
            assert moved > 0


@pytest.mark.parametrize("flow", FLOWS[:2], ids=lambda f: f.value)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_only_the_streamed_share_crosses(model: VerifierModel, flow: Flow, ratio: float) -> None:
    """Bytes of one decode step, against those of the same step with nothing streamed."""
    c, n, capacity = model.tensors.config, 1100, 40
    sent = {}
    for p in (0.0, ratio):
        config = settings(prover_kv_tokens=capacity, offload_ratio=p)
        with Session(model, lambda m: ThreadProver(m.path), config, flow) as session:
            session.run(Batch((BatchEntry(0, 0, tuple(tokens(0, n))),)))
            before = session.channel.bytes_sent
            session.run(Batch((BatchEntry(0, n, (5,)),)))
            sent[p] = session.channel.bytes_sent - before
    blocks = min(int(ratio * (n + 1 - capacity)), n - capacity) // PAGE
    key = c.num_kv_heads * (2 * c.head_dim + 4)
    assert sent[ratio] - sent[0.0] == c.num_layers * blocks * (PAGE * key + 2 * (16 + HEADER_BYTES))


# --- the controller at work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS[:2], ids=lambda f: f.value)
def test_decisions_are_in_the_report_and_in_the_trace(model: VerifierModel, flow: Flow) -> None:
    trace = Trace()
    session = Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=0, trace=trace), flow)
    play(session, steps(SHORT[1], 650, 12))
    labels = [s.label for s in trace.spans if s.label.startswith("offload ratio")]
    assert session.split is not None
    counters = session.split.stats.counters()
    assert len(labels) == len(counters["offload_ratios"]) == 14
    assert counters["offload_ratio"] == counters["offload_ratios"][-1]
    assert all(0 <= p <= 1 for p in counters["offload_ratios"])
    # Two layers and twelve steps: the rungs that are tried first have all been tried.
    assert counters["offload_trials"] >= 4
    assert f"{counters['offload_ratio']:.3f}" in labels[-1]


def test_a_fixed_ratio_is_kept(model: VerifierModel) -> None:
    session = Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=0, offload_ratio=0.4))
    play(session, steps((600,), 600, 3))
    assert session.split is not None and session.split.stats.ratios == [0.4] * 4 and session.split.stats.trials == 0


def test_the_first_layers_that_stay_here_are_not_counted(model: VerifierModel, truth: Truth) -> None:
    """With a shield the first layers never leave: keys are counted where attention is shared."""
    config = settings(prover_kv_tokens=64, offload_ratio=0.5, kv_shield="session", shield_first_layers=1)
    session = Session(model, lambda m: ThreadProver(m.path), config, Flow.VERIATTN)
    assert same(play(session, steps(SHORT[1], 640, 2)), truth(SHORT[1], 640, 2))
    assert session.split is not None
    stats = session.split.stats
    assert stats.prover_tokens > 0 and stats.streamed_tokens > 0 and stats.tee_tokens > 0


# --- cutting ----------------------------------------------------------------------------------------------------------

ENTRIES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 40), st.sampled_from(["none", "last", "all"]), st.integers(0, 60)),
    min_size=1,
    max_size=6,
)


@given(ENTRIES)
def test_cuts_keep_every_token_and_row_and_no_part_crosses_a_limit(drawn: list[tuple[int, int, Any, int]]) -> None:
    entries = tuple(BatchEntry(s, a, tuple(range(n)), r) for s, (a, n, r, _) in enumerate(drawn))
    limits = {s: limit for s, (_, _, _, limit) in enumerate(drawn)}
    parts = cut_at_limits(Batch(entries), limits)
    assert 1 <= len(parts) <= 2
    for e in entries:
        pieces = [p for part in parts for p in part.entries if p.seq_id == e.seq_id]
        assert tuple(t for p in pieces for t in p.token_ids) == e.token_ids
        assert [p.start for p in pieces] == [e.start, limits[e.seq_id]][: len(pieces)]
        for p in pieces:
            assert p.start >= limits[e.seq_id] or p.start + p.num_tokens <= limits[e.seq_id]
        rows = sum({"none": 0, "last": 1, "all": p.num_tokens}[p.logits] for p in pieces)
        assert rows == {"none": 0, "last": 1, "all": e.num_tokens}[e.logits]


def test_no_limits_no_cuts() -> None:
    batch = Batch((BatchEntry(0, 3, (1, 2, 3)), BatchEntry(1, 0, (4,), "all")))
    assert cut_at_limits(batch, {}) == [batch]


@pytest.mark.parametrize(
    "wrong",
    [{"offload_ratio": p} for p in (-0.01, 1.01, float("nan"), float("inf"))]
    + [{name: -1} for name in ("prover_kv_tokens", "prover_kv_total", "tee_memory_bytes")],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings(**wrong)


def test_defaults_share_nothing() -> None:
    assert SessionConfig().prover_kv_tokens is None and SessionConfig().prover_kv_total is None
