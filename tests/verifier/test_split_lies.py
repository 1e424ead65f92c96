"""Every lie about a share of attention is caught with the right code; each has a twin that passes, with nothing altered."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.verifier.shares import FLOWS, MakeSink, ThreadProver, Truth, play, same, settings, steps, tokens

from veriattn.errors import AttentionMismatch, ProverFault, ProverTimeout, ProverUnavailable, TranscriptMismatch
from veriattn.prover import split as prover_split
from veriattn.prover.cpu import CpuBackend
from veriattn.prover.serve import ChannelSink
from veriattn.spec.field import OUTPUT_LIMIT, P
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.reference import F32, I64
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session
from veriattn.verifier.split import SplitAttention
from veriattn.wire.channel import Channel
from veriattn.wire.messages import Kind

Array = np.ndarray[Any, Any]
Change = Callable[[Array], Array]

#: Two sequences beyond the limit, and one that never gets there. With all of it streamed: 3 and 2 full blocks.
LENGTHS, CHUNK, DECODE, LIMIT = (870, 640, 20), 870, 3, 64
ATTENTION, FREIVALDS, TRANSCRIPT = "attention_mismatch", "freivalds_mismatch", "transcript_mismatch"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> VerifierModel:
    return VerifierModel(tiny_model)


@pytest.fixture(scope="module")
def truth(tiny_model: Path) -> list[F32]:
    return Truth(tiny_model)(LENGTHS, CHUNK, DECODE)


IN_SHARE = threading.local()


@pytest.fixture(autouse=True)
def mark_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell claims of shares from those of sequences that the prover holds."""
    honest = prover_split.SplitProver.answer

    def answer(*args: Any) -> Any:
        IN_SHARE.now = True
        try:
            return honest(*args)
        finally:
            IN_SHARE.now = False

    monkeypatch.setattr(prover_split.SplitProver, "answer", answer)


class Meddler:
    """Alters claims of shares whose name begins in one way, from the n-th on, or passes them on; counts what it met."""

    def __init__(self, name: str, change: Change | None, first: int = 0) -> None:
        self.name, self.change, self.first = name, change, first
        self.met = 0
        self.earlier: list[Array] = []

    def __call__(self, channel: Channel) -> ChannelSink:
        meddler = self

        class Sink(ChannelSink):
            def claim(self, name: str, values: Array) -> None:
                if getattr(IN_SHARE, "now", False) and name.startswith(meddler.name):
                    meddler.met += 1
                    if meddler.change is not None and meddler.met > meddler.first:
                        values = np.ascontiguousarray(meddler.change(values.copy()))
                    meddler.earlier.append(values.copy())
                super().claim(name, values)

        return Sink(channel)


def run(model: VerifierModel, flow: Flow, make_sink: MakeSink = ChannelSink, **changes: Any) -> list[F32]:
    config = settings(prover_kv_tokens=LIMIT, **{"offload_ratio": 1.0, **changes})
    return play(Session(model, lambda m: ThreadProver(m.path, make_sink), config, flow), steps(LENGTHS, CHUNK, DECODE))


def caught(model: VerifierModel, flow: Flow, make_sink: MakeSink = ChannelSink) -> tuple[str, str]:
    """Code and message of the fault. The session is over, and what it kept is overwritten."""
    config = settings(prover_kv_tokens=LIMIT, offload_ratio=1.0)
    session = Session(model, lambda m: ThreadProver(m.path, make_sink), config, flow)
    with session, pytest.raises(ProverFault) as error:
        for batch in steps(LENGTHS, CHUNK, DECODE):
            session.run(batch)
    with pytest.raises(ProverUnavailable):
        session.run(Batch((BatchEntry(7, 0, (5,)),)))
    assert session.closed and session.split is not None
    assert not any(
        np.any(a) for layer in session.split.cache.layers for a in (*layer.arrays.values(), *layer.page_arrays.values())
    )
    return error.value.code, str(error.value)


def element(where: float, by: int) -> Change:
    def change(values: Array) -> Array:
        values.reshape(-1)[int(where * (values.size - 1))] += by
        return values

    return change


def put(value: int) -> Change:
    def change(values: Array) -> Array:
        values.reshape(-1)[values.size // 2] = value
        return values

    return change


def heads_swapped(axis: int, a: int = 0, b: int = 1) -> Change:
    def change(values: Array) -> Array:
        order = list(range(values.shape[axis]))
        order[a], order[b] = order[b], order[a]
        return values.take(order, axis=axis)

    return change


def blocks_swapped(values: Array) -> Array:
    """The columns of two streamed blocks of keys."""
    values[..., LIMIT : LIMIT + 512] = np.roll(values[..., LIMIT : LIMIT + 512], 256, axis=-1)
    return values


SCORES, OUTPUTS = "layers.1.scores.0", "layers.1.attention.0"
CLAIMS: dict[str, tuple[str, Change, str, str]] = {
    **{
        f"score {where} by {by}": (SCORES, element(where, by), ATTENTION, "scores are wrong")
        for where in (0.0, 0.37, 1.0)
        for by in (1, -1, 1 << 20)
    },
    **{
        f"output {where} by {by}": (OUTPUTS, element(where, by), ATTENTION, "output is wrong")
        for where in (0.0, 0.61, 1.0)
        for by in (1, -1)
    },
    # A score so large that everything else is clipped, one so small that its own key is.
    "a maximum for all": (SCORES, put(2**31 - 1), ATTENTION, "scores are wrong"),
    "a key that vanishes": (SCORES, put(-(2**31)), ATTENTION, "scores are wrong"),
    "all scores zero": (SCORES, np.zeros_like, ATTENTION, "scores are wrong"),
    "all outputs zero": (OUTPUTS, np.zeros_like, ATTENTION, "output is wrong"),
    "scores of two heads of a group swapped": (SCORES, heads_swapped(0), ATTENTION, "scores are wrong"),
    "scores of heads of two groups swapped": (SCORES, heads_swapped(0, 0, 5), ATTENTION, "scores are wrong"),
    "outputs of two heads of a group swapped": (OUTPUTS, heads_swapped(1), ATTENTION, "output is wrong"),
    "outputs of heads of two groups swapped": (OUTPUTS, heads_swapped(1, 0, 5), ATTENTION, "output is wrong"),
    "two blocks swapped": (SCORES, blocks_swapped, ATTENTION, "scores are wrong"),
    "a multiple of the prime": (OUTPUTS, element(0.5, P), ATTENTION, "2**39 or larger"),
    "the lower end of the type": (OUTPUTS, put(-(2**63)), ATTENTION, "2**39 or larger"),
    "at the limit": (OUTPUTS, put(OUTPUT_LIMIT), ATTENTION, "2**39 or larger"),
    "below the limit": (OUTPUTS, put(OUTPUT_LIMIT - 1), ATTENTION, "output is wrong"),
    # More or fewer keys, rows or dimensions than the share has.
    "scores of one key more": (SCORES, lambda v: np.concatenate([v, v[..., :1]], axis=-1), TRANSCRIPT, "CLAIM"),
    "scores of one block less": (SCORES, lambda v: v[..., :-256], TRANSCRIPT, "CLAIM"),
    "no scores": (SCORES, lambda v: v[..., :0], TRANSCRIPT, "CLAIM"),
    "outputs of half the size": (OUTPUTS, lambda v: v.astype(np.int32), TRANSCRIPT, "CLAIM"),
}


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("lie", CLAIMS)
def test_claims(model: VerifierModel, flow: Flow, lie: str) -> None:
    name, change, code, message = CLAIMS[lie]
    meddler = Meddler(name, change)
    got = caught(model, flow, meddler)
    assert got[0] == code and message in got[1] and meddler.met > 0
    if code == ATTENTION:
        assert "layers.1.attention, sequence 0" in got[1]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("name", [SCORES, OUTPUTS])
def test_the_twin_of_claims(model: VerifierModel, truth: list[F32], flow: Flow, name: str) -> None:
    meddler = Meddler(name, lambda values: values)
    assert same(run(model, flow, meddler), truth) and meddler.met >= DECODE + 1


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize(("name", "message"), [(SCORES, "scores are wrong"), (OUTPUTS, "output is wrong")])
def test_an_old_share_again(model: VerifierModel, truth: list[F32], flow: Flow, name: str, message: str) -> None:
    """The claim of the decode step before, which was right there and has the same size here."""

    def earlier(values: Array) -> Array:
        # Under tsdp there is one key more in every step: what is new is right, all the rest is old.
        old = meddler.earlier[-1]
        new = values[..., old.shape[-1] :]
        return np.concatenate([old, new], axis=-1) if new.size else old

    meddler = Meddler(name, earlier, first=2)
    code, text = caught(model, flow, meddler)
    assert code == ATTENTION and message in text and meddler.met == 3
    meddler = Meddler(name, None)
    assert same(run(model, flow, meddler), truth)


# --- what the prover makes of what it is sent ---------------------------------------------------------------------------


def altered(
    monkeypatch: pytest.MonkeyPatch, decoder: str, which: int, change: Callable[[Any], Any] | None
) -> list[int]:
    """Have the prover see the n-th payload of a kind differently; returns where they are counted."""
    honest, met = getattr(prover_split, decoder), [0]

    def decode(*args: Any) -> Any:
        value = honest(*args)
        met[0] += 1
        return change(value) if change is not None and met[0] == which + 1 else value

    monkeypatch.setattr(prover_split, decoder, decode)
    return met


def one_key(value: Any) -> Any:
    k, scale = value
    k = k.copy()
    k[-1, 0, 0] ^= 1
    return k, scale


def one_value(value: Array) -> Array:
    value = value.copy()
    value[0, -1, -1] ^= 1
    return value


#: Blocks that one decode step of both sequences streams, of either kind: 3 and 2 for each of two layers.
BLOCKS = 10


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize(
    ("decoder", "change", "message"),
    [("decode_key_block", one_key, "scores are wrong"), ("decode_value_block", one_value, "output is wrong")],
)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_streamed_block(
    model: VerifierModel,
    flow: Flow,
    decoder: str,
    change: Any,
    message: str,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One bit of one streamed block, each in turn, is seen differently."""
    met = altered(monkeypatch, decoder, block, change)
    code, text = caught(model, flow)
    assert code == ATTENTION and message in text and met[0] > block


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("decoder", ["decode_key_block", "decode_value_block"])
def test_the_twin_of_streamed_blocks(
    model: VerifierModel, truth: list[F32], flow: Flow, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = altered(monkeypatch, decoder, 0, lambda value: value)
    assert same(run(model, flow), truth) and met[0] >= BLOCKS


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("name", ["decode_key_block", "decode_value_block"])
@pytest.mark.parametrize("of", ["step", "sequence"])
def test_stale_blocks(model: VerifierModel, flow: Flow, name: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block kept from before stands for a later one of its size: always the very first, or the one just before."""
    honest, kept = getattr(prover_split, name), {}

    def decode(payload: Any, count: int, config: Any) -> Any:
        now = honest(payload, count, config)
        before = kept.setdefault(count, now)
        if of == "sequence":
            kept[count] = now
        return before

    monkeypatch.setattr(prover_split, name, decode)
    code, text = caught(model, flow)
    assert code == ATTENTION and ("scores" if "key" in name else "output") in text


@pytest.mark.parametrize("flow", FLOWS[:2], ids=lambda f: f.value)
@pytest.mark.parametrize("factor", [0.875, 1.125, 1e4, 0.0, -1.0])
def test_another_maximum(model: VerifierModel, flow: Flow, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prover that normalises by another maximum, so that what it should merge is clipped: its outputs are wrong."""
    honest = prover_split.decode_array

    def other(payload: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        values = honest(payload, dtype, shape)
        return values * np.float32(factor) if dtype == "<f4" else values

    monkeypatch.setattr(prover_split, "decode_array", other)
    code, text = caught(model, flow)
    assert code == ATTENTION and "output is wrong" in text


def test_other_weights(model: VerifierModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same under tsdp, where weights travel in place of maxima."""
    honest = prover_split.decode_array

    def other(payload: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        values = honest(payload, dtype, shape).copy()
        if dtype == "<u2":
            values[0, 0, :2] = values[0, 0, 1::-1]
        return values

    monkeypatch.setattr(prover_split, "decode_array", other)
    code, text = caught(model, Flow.TSDP)
    assert code == ATTENTION and "output is wrong" in text


@pytest.mark.parametrize("what", ["nothing", "outputs", "sums"])
def test_the_verifiers_share(
    model: VerifierModel, truth: list[F32], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run-ahead: a prover that drops our outputs, or our row sums, goes on from wrong attention; the next linear shows it."""
    honest, met = prover_split.SplitProver.other_share, []

    def other(self: prover_split.SplitProver, rows: int) -> tuple[I64, Any]:
        o, row_sum = honest(self, rows)
        met.append(rows)
        return o * (what != "outputs"), row_sum * (what != "sums")

    monkeypatch.setattr(prover_split.SplitProver, "other_share", other)
    if what == "nothing":
        assert same(run(model, Flow.RUN_AHEAD, offload_ratio=0.3), truth)
    else:
        code, text = caught(model, Flow.RUN_AHEAD)
        assert code == FREIVALDS and text.startswith("layers.0.o")
    assert met


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_shares_of_two_sequences_swapped(model: VerifierModel, flow: Flow) -> None:
    """Two sequences of one length: each gets the other's outputs, claimed in the right order."""

    def batches(same_text: bool) -> list[Batch]:
        text = [tokens(0, 640), tokens(0 if same_text else 1, 640)]
        first = Batch(tuple(BatchEntry(s, 0, tuple(text[s])) for s in (0, 1)))
        return [first, Batch(tuple(BatchEntry(s, 640, (9,)) for s in (0, 1)))]

    held: dict[str, Array] = {}

    def change(values: Array) -> Array:
        return held.setdefault("first", values)

    for same_text in (False, True):
        held.clear()
        # Claims of layer 0 in the decode step: what sequence 0 was answered goes to sequence 1 as well.
        meddler = Meddler("layers.0.attention.", change, first=2)
        config = settings(prover_kv_tokens=LIMIT, offload_ratio=1.0)
        session = Session(model, lambda m, sink=meddler: ThreadProver(m.path, sink), config, flow)  # type: ignore[misc]
        if same_text:
            play(session, batches(True))
            continue
        with pytest.raises(AttentionMismatch, match=r"sequence 1.*output is wrong"):
            play(session, batches(False))


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("keeps", [True, False])
def test_keys_of_a_freed_sequence(
    model: VerifierModel, flow: Flow, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prover that goes on attending to what a freed sequence left in its cache, under the same id and length."""
    old: dict[int, Any] = {}
    free, split = CpuBackend.free, prover_split.SplitProver.answer

    def note(self: CpuBackend, seq_id: int) -> None:
        arrays, table = self.operations.pages(0, seq_id)
        old[seq_id] = arrays["k"][table].copy()
        free(self, seq_id)

    def answer(self: Any, request: Any, local: Any, *rest: Any) -> Any:
        if keeps and request.layer == 0 and request.seq_id in old:
            arrays, table = local.pages(0, request.seq_id)
            arrays["k"][table] = old[request.seq_id]
        return split(self, request, local, *rest)

    monkeypatch.setattr(CpuBackend, "free", note)
    monkeypatch.setattr(prover_split.SplitProver, "answer", answer)
    config = settings(prover_kv_tokens=LIMIT, prover_kv_total=LIMIT, offload_ratio=1.0)
    with Session(model, lambda m: ThreadProver(m.path), config, flow) as session:
        session.run(Batch((BatchEntry(0, 0, tuple(tokens(0, 700))),)))
        session.free(0)
        again = Batch((BatchEntry(0, 0, tuple(tokens(3, 700))),))
        if keeps:
            with pytest.raises(AttentionMismatch, match="scores are wrong"):
                session.run(again)
        else:
            session.run(again)
    assert 0 in old


@pytest.mark.parametrize("flow", FLOWS[:2], ids=lambda f: f.value)
@pytest.mark.parametrize("slow", ["when it is sent keys", "when it is sent none", "every other time"])
def test_a_prover_that_bends_the_times(model: VerifierModel, truth: list[F32], flow: Flow, slow: str) -> None:
    """It chooses when to be late, so that other ratios look better than they are: the tokens are the same, p is in [0, 1]."""

    def late(values: Array) -> Array:
        streamed = values.shape[-1] > LIMIT
        if {"when it is sent keys": streamed, "when it is sent none": not streamed}.get(slow, meddler.met % 2):
            time.sleep(0.003)
        return values

    meddler = Meddler("layers.0.scores", late)
    config = settings(prover_kv_tokens=LIMIT)
    session = Session(model, lambda m: ThreadProver(m.path, meddler), config, flow)
    assert same(play(session, steps(LENGTHS, CHUNK, 12))[: len(truth)], truth) and meddler.met > 12
    assert session.split is not None
    stats = session.split.stats
    assert len(stats.ratios) == 13 and all(0 <= p <= 1 for p in (*stats.ratios, *stats.used[-1]))


# --- interruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("place", ["_check_scores", "_stream_values", "_segments", "_restored"])
def test_cancelled_in_the_middle_of_a_step(
    model: VerifierModel, flow: Flow, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever interrupts an exchange ends the session; its thread ends, its secrets and keys are overwritten."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    session = Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=LIMIT, offload_ratio=1.0), flow)
    first, *rest = steps(LENGTHS, CHUNK, DECODE)
    session.run(first)
    monkeypatch.setattr(SplitAttention, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.run(rest[0])
    monkeypatch.undo()
    with pytest.raises(ProverUnavailable):
        session.run(rest[0])
    assert session.closed and session.split is not None
    assert not any(np.any(a) for layer in session.split.cache.layers for a in layer.arrays.values())
    assert threading.active_count() <= threads


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
@pytest.mark.parametrize("place", [Kind.SPLIT, Kind.BLOCK, Kind.NORMALISER])
def test_a_prover_killed_in_the_middle_of_a_step(
    model: VerifierModel, flow: Flow, place: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(prover_kv_tokens=LIMIT, offload_ratio=1.0)
    session = Session(model, lambda m: ChildProver(m, threads=1), config, flow)
    first, *rest = steps(LENGTHS, CHUNK, DECODE)
    with session:
        session.run(first)
        assert session.split is not None
        send, killed = session.split._send, []

        def kill(kind: Kind, parts: Any) -> None:
            if kind is place and not killed:
                assert session.prover.pid is not None
                os.kill(session.prover.pid, signal.SIGKILL)
                killed.append(kind)
            send(kind, parts)

        monkeypatch.setattr(session.split, "_send", kill)
        with pytest.raises(ProverUnavailable):
            session.run(rest[0])
    assert session.closed and killed


@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_a_prover_that_falls_silent(model: VerifierModel, flow: Flow) -> None:
    released = threading.Event()  # never set: it waits

    def stop(values: Array) -> Array:
        released.wait(1)
        return values

    config = settings(prover_kv_tokens=LIMIT, offload_ratio=1.0, step_timeout_s=0.3)
    session = Session(model, lambda m: ThreadProver(m.path, Meddler(SCORES, stop)), config, flow)
    with pytest.raises(ProverTimeout):
        session.run(steps(LENGTHS, CHUNK, 0)[0])
    assert session.closed


def test_messages_of_another_kind(model: VerifierModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOGITS in place of a share's scores."""

    class Sink(ChannelSink):
        def claim(self, name: str, values: Array) -> None:
            if name.startswith(SCORES):
                self._channel.send(Kind.LOGITS, values)
            else:
                super().claim(name, values)

    with pytest.raises(TranscriptMismatch):
        run(model, Flow.RUN_AHEAD, Sink)
