"""Memory where the cache has outgrown the prover: bounded here, before it is taken, and there; contexts of 131,072 keys."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.helpers import tiny_config
from tests.verifier.shares import FLOWS, ThreadProver, settings, tokens

from veriattn.engine.strategies import FullTeeExecutor, TeeWeights
from veriattn.errors import AttentionMismatch, ConfigError
from veriattn.native import value_projection
from veriattn.prover.serve import ChannelSink
from veriattn.prover.split import SplitProver
from veriattn.spec.constants import SPEC_VERSION
from veriattn.spec.field import OUTPUT_LIMIT
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry
from veriattn.spec.kv import PAGE, PagedCache
from veriattn.spec.local import LocalOperations
from veriattn.spec.reference import attention_contiguous
from veriattn.verifier import tiling
from veriattn.verifier.checks import CheckCounts, ClaimChecker
from veriattn.verifier.keys import KeySet
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.mediated import QueuedSender
from veriattn.verifier.memory import Need, reserve
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session
from veriattn.verifier.split import SplitAttention
from veriattn.wire.channel import StreamChannel, accept_channel
from veriattn.wire.messages import Hello, Kind, Limits, Mode, VerifierGone, decode_hello, encode_hello
from veriattn.wire.split import decode_split


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> VerifierModel:
    return VerifierModel(tiny_model)


def one(seq_id: int, start: int, count: int) -> Batch:
    return Batch((BatchEntry(seq_id, start, tuple(tokens(seq_id, start + count)[start:])),))


# --- in the TEE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 100, None])
@pytest.mark.parametrize("flow", FLOWS, ids=lambda f: f.value)
def test_refused_before_the_limit_is_passed(model: VerifierModel, flow: Flow, capacity: int | None) -> None:
    """The session goes on after a refusal: what fits is run, and what was refused when something has been freed."""

    def start(limit: int | None) -> Session:
        config = settings(prover_kv_tokens=capacity, offload_ratio=0.5, tee_memory_bytes=limit)
        return Session(model, lambda m: ThreadProver(m.path), config, flow)

    with start(None) as session:
        expected = session.run(one(0, 0, 900))
    c, cut = model.tensors.config, 10_000 if capacity is None else capacity
    pages = -(-min(cut, 901) // PAGE), -(-max(901 - cut, 0) // PAGE)
    d, sums = c.head_dim, 16 * c.head_dim
    per_head = pages[0] * PAGE * (d + 20) + pages[1] * (PAGE * (2 * d + 20) + sums) + sums
    limit = c.num_layers * c.num_kv_heads * per_head
    with start(limit) as session:
        session.run(one(0, 0, 900))
        with pytest.raises(ConfigError, match="the limit is") as error:
            session.run(Batch((BatchEntry(1, 0, tuple(tokens(1, 1800))), BatchEntry(0, 900, (5,)))))
        assert error.value.exit_code == 2 and "--tee-memory" in (error.value.hint or "")
        assert not session.closed and session.kv_bytes <= limit
        if session.split is not None:
            assert set(session.split.limits) == {0}, "a refused sequence holds no capacity"
        session.run(one(0, 900, 1))
        session.free(0)
        assert np.array_equal(session.run(Batch((BatchEntry(1, 0, tuple(tokens(0, 900))),))), expected)
        assert session.kv_bytes <= limit
    with start(1000) as session, pytest.raises(ConfigError):
        session.run(one(0, 0, 1))


@pytest.mark.parametrize("capacity", [0, 300, None])
def test_the_limit_holds_at_every_length(model: VerifierModel, capacity: int | None) -> None:
    """Pools grow by doubling only as far as the limit lets them; it is used to the last page."""
    limit = 250_000
    config = settings(prover_kv_tokens=capacity, offload_ratio=0.0, tee_memory_bytes=limit)
    with Session(model, lambda m: ThreadProver(m.path), config) as session:
        length = 0
        with pytest.raises(ConfigError):
            while length < 2000:
                session.run(one(0, length, 100))
                length += 100
                assert session.kv_bytes <= limit
        c = model.tensors.config
        page = PAGE * c.num_layers * c.num_kv_heads * (2 * c.head_dim + 4 + 16)
        assert length > 0 and session.kv_bytes > limit - 2 * page
        session.run(one(0, length, 1))


def test_memory_per_key_is_what_the_formula_says(model: VerifierModel) -> None:
    """docs/split.md: 2 d + 20 bytes per key, KV head and layer beyond the limit, d + 20 below it, and sums per 256 keys."""
    c = model.tensors.config
    per_head = c.num_layers * c.num_kv_heads
    with Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=PAGE, tee_memory_bytes=1 << 30)) as s:
        for at in range(0, 8 * PAGE, PAGE):
            s.run(one(0, at, PAGE))
        assert s.split is not None and s._checker is not None
        beyond, below = s.split.cache.layers[0], s._checker.cache.layers[0]
        sums = 16 * c.head_dim
        assert beyond.page_bytes * c.num_layers == per_head * (PAGE * (2 * c.head_dim + 20) + sums)
        assert below.page_bytes * c.num_layers == per_head * PAGE * (c.head_dim + 20)
        assert s.kv_bytes == sum(p.page_bytes * p.pages * c.num_layers for p in (beyond, below)) + per_head * sums


def test_full_tee_keeps_the_limit_too(tiny_model: Path) -> None:
    executor = FullTeeExecutor(TeeWeights(tiny_model), 1 << 14, 8, 200_000)
    executor.run(one(0, 0, 600))
    with pytest.raises(ConfigError, match="the limit is"):
        executor.run(one(1, 0, 1500))
    executor.run(one(0, 600, 1))
    assert 0 < executor.report().kv_tee_bytes <= 200_000


def _cache() -> PagedCache:
    byte = np.dtype(np.uint8)
    return PagedCache(2, {"k": (byte, (3,))}, 1 << 20, {"c": (byte, (5,))})


@hypothesis_settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 900), st.booleans()), max_size=30),
    st.integers(0, 60_000),
)
def test_a_reservation_suffices_and_is_never_too_large(actions: list[tuple[int, int, bool]], limit: int) -> None:
    caches = [_cache(), _cache()]
    for seq_id, count, frees in actions:
        before = [c.nbytes for c in caches]
        try:
            reserve([Need(caches, [(seq_id, count)], 100)], limit)
        except ConfigError:
            assert [c.nbytes for c in caches] == before
            continue
        reserved = [c.pages for c in caches]
        for cache in caches:
            cache.extend(seq_id, count)
            assert len(cache.table(seq_id)) == -(-cache.length(seq_id) // PAGE)
        assert [c.pages for c in caches] == reserved, "the reservation did not suffice"
        assert 100 + sum(c.nbytes for c in caches) <= limit
        if frees:
            for cache in caches:
                cache.free(seq_id)


def test_freed_sequences_leave_nothing(model: VerifierModel) -> None:
    with Session(model, lambda m: ThreadProver(m.path), settings(prover_kv_tokens=10)) as session:
        session.run(one(0, 0, 900))
        assert session.split is not None
        layer = session.split.cache.layer(0)
        held = [*layer.arrays.values(), *layer.page_arrays.values()]
        assert all(np.any(a) for a in held)
        session.free(0)
        assert not any(np.any(a) for a in held)
        assert session.split.limits == {}


# --- at the prover ------------------------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("flow", FLOWS[:2], ids=lambda f: f.value)
def test_the_prover_stays_at_its_cap(
    make_model: Callable[..., Path], flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the real process over a context that grows from 1,024 to 4,096 tokens: with a limit it gains next to nothing,
    without one it gains what the cache takes. Scores of a tile of rows, which come and go, are kept small."""
    monkeypatch.setattr(tiling, "SCORE_BYTES", 1 << 20)
    path = make_model(num_layers=16, num_heads=4, num_kv_heads=4, head_dim=64, rotary_dim=8, max_positions=4096)
    model = VerifierModel(path)
    c = model.tensors.config
    start, end, step = 1024, 4096, 256
    cache = (end - start) * c.num_layers * c.num_kv_heads * (2 * c.head_dim + 4)
    gained = {}
    for capacity in (512, None):
        config = settings(prover_kv_tokens=capacity, offload_ratio=0.15, max_tokens_per_step=start)
        with Session(model, lambda m: ChildProver(m, threads=1), config, flow) as session:
            assert session.prover.pid is not None
            most = []
            session.run(one(0, 0, start))
            for at in range(start, end, step):
                session.run(one(0, at, step))
                most.append(resident_bytes(session.prover.pid))
            gained[capacity] = max(most) - most[0]
            if capacity is not None:
                assert session.split is not None and session.split.stats.streamed_tokens > 0
    assert gained[None] > cache // 2
    assert gained[512] < cache // 4


# --- 131,072 keys -------------------------------------------------------------------------------------------------------


class Exchange:
    """Split attention of one layer over synthetic keys: the verifier's class and the prover's, over a socket."""

    def __init__(
        self, keys: int, limit: int, ratio: float, k: Any, k_scale: Any, v: Any, make_sink: Any = ChannelSink
    ) -> None:
        kv, d = k.shape[1:]
        self.config = tiny_config(
            num_layers=1, num_heads=2 * kv, num_kv_heads=kv, head_dim=d, rotary_dim=2, max_positions=131072
        )
        ours, theirs = socket.socketpair()
        limits = Limits(
            max_tokens_per_step=4, max_sequences=1, max_positions=131072, kv_tokens=max(limit, 1), vocab_size=300
        )
        self._thread = threading.Thread(
            target=self._prove, args=(theirs, limits, k[:limit], k_scale[:limit], v[:limit], make_sink)
        )
        self._thread.start()
        self.channel = StreamChannel.offer(ours, 60.0)
        assert self.channel.session is not None
        hello = Hello(SPEC_VERSION, self.channel.session, "", "0" * 64, Mode.OPERATIONS, limits)
        self.channel.send(Kind.HELLO, encode_hello(hello))
        self.checker = ClaimChecker(self.config, KeySet(self.config), True, CheckCounts())
        self._sender = QueuedSender(self.channel)
        self.split = SplitAttention(self.checker, self.channel, self._sender, ratio)
        self.split.limits[0] = limit
        self.old = keys - 1
        for start, stop in ((0, limit), (limit, self.old)):
            part = BatchEntry(0, start, (1,) * (stop - start))
            if start == 0 and limit:
                self.checker.cache.append(0, part, k[:limit], k_scale[:limit], self._projected(v[:limit]))
            elif stop > start:
                self.split.cache.append(0, part, limit, k[start:stop], k_scale[start:stop], v[start:stop])
        self._last = slice(self.old, keys)

    def _projected(self, v: Any) -> Any:
        return value_projection(v, self.checker.keys.attention(0))

    def _prove(self, sock: socket.socket, limits: Limits, k: Any, k_scale: Any, v: Any, make_sink: Any) -> None:
        channel = accept_channel(sock)
        try:
            decode_hello(channel.recv_any(None)[1])
            local = LocalOperations(self.config, lambda _: None)
            if k.shape[0]:
                local.append(0, 0, 0, range(self.config.num_kv_heads), k, k_scale, v)
            shares = SplitProver(channel, self.config, limits)
            while True:
                _, payload = channel.recv_any(limits, operation_bytes=1 << 24)
                r = decode_split(payload, self.config, limits)
                shares.answer(r, local, r.q_i8, r.q_scale, make_sink(channel))  # type: ignore[arg-type]
        except VerifierGone:
            return
        finally:
            channel.close()

    def attend(self, q: Any, q_scale: Any, k: Any, k_scale: Any, v: Any) -> Any:
        batch = Batch((BatchEntry(0, self.old, (1,)),))
        at = self._last
        x = AttentionInput(q, q_scale, k[at], k_scale[at], v[at])
        return self.split.attention(0, batch, x, lambda *_: None, mediated=True)  # type: ignore[arg-type,return-value]

    def close(self) -> None:
        self.channel.abort()
        self._sender.close()
        self.channel.close()
        self._thread.join(20)


KEYS, DIM = 131_072, 16


@pytest.mark.parametrize("content", ["extreme", "random"])
@pytest.mark.parametrize(("limit", "ratio"), [(0, 0.5), (1000, 1.0), (70_000, 0.3), (131_071, 0.0)])
def test_the_longest_context(limit: int, ratio: float, content: str) -> None:
    """All 131,072 keys that the spec allows. Extreme: every score, weight and value at its bound, so that L is 16336 * 131072
    (just below 2**31) and |O| = 127 L (just below 2**38)."""
    rng = np.random.default_rng(limit)
    if content == "extreme":
        k, v = np.full((KEYS, 1, DIM), 127, np.int8), np.full((KEYS, 1, DIM), -127, np.int8)
        q, k_scale = np.full((1, 2, DIM), 127, np.int8), np.ones((KEYS, 1), np.float32)
    else:
        k, v = (rng.integers(-127, 128, (KEYS, 1, DIM), dtype=np.int8) for _ in range(2))
        q, k_scale = (
            rng.integers(-127, 128, (1, 2, DIM), dtype=np.int8),
            rng.uniform(0.5, 1, (KEYS, 1)).astype(np.float32),
        )
    q_scale = np.full((1, 2), 2e-3, np.float32)
    exchange = Exchange(KEYS, limit, ratio, k, k_scale, v)
    try:
        o, row_sum = exchange.attend(q, q_scale, k, k_scale, v)
    finally:
        exchange.close()
    expected = attention_contiguous(q, q_scale, k, k_scale, v, KEYS - 1)
    assert np.array_equal(o, expected[0]) and np.array_equal(row_sum, expected[1])
    if content == "extreme":
        assert np.all(row_sum == 16336 * KEYS) and 2**31 - 10 * KEYS * 127 < 16336 * KEYS < 2**31
        assert np.all(o == -127 * 16336 * KEYS) and 2**37 < 127 * 16336 * KEYS < 2**38 < OUTPUT_LIMIT
    stats = exchange.split.stats
    assert (
        stats.prover_tokens == limit
        and stats.streamed_tokens == min(int(ratio * (KEYS - limit)), KEYS - 1 - limit) // PAGE * PAGE
    )
    assert stats.prover_tokens + stats.streamed_tokens + stats.tee_tokens == KEYS


@pytest.mark.parametrize("at", [0, 65_535, 130_815])
def test_one_wrong_score_among_the_longest(at: int) -> None:
    """One of 130,816 streamed keys, at either end or in the middle; off by one."""
    rng = np.random.default_rng(at)
    k, v = (rng.integers(-127, 128, (KEYS, 1, DIM), dtype=np.int8) for _ in range(2))
    k_scale, q_scale = np.ones((KEYS, 1), np.float32), np.full((1, 2), 1e-3, np.float32)
    q = rng.integers(-127, 128, (1, 2, DIM), dtype=np.int8)

    class Liar(ChannelSink):
        def claim(self, name: str, values: Any) -> None:
            if "scores" in name:
                values[1, 0, at] -= 1
            super().claim(name, values)

    exchange = Exchange(KEYS, 0, 1.0, k, k_scale, v, Liar)
    try:
        with pytest.raises(AttentionMismatch, match=r"head 1: the claimed scores are wrong"):
            exchange.attend(q, q_scale, k, k_scale, v)
    finally:
        exchange.close()
