"""The native kernels against the limits of one core, both measured in the same run.

Times are CPU time of one thread, the median of several calls, so that other work on the machine disturbs them little;
`copy_in.all_threads` alone is wall time.
The bars are those of a CPU with AMX; elsewhere `met` is None and the figure is for information.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from veriattn.native import kernels
from veriattn.spec.field import P
from veriattn.spec.kv import PAGE

Array = npt.NDArray[Any]


class Result(TypedDict):
    """One line of a benchmark. roofline: what this machine could do at best, in the same unit; fraction: how near."""

    name: str
    value: float
    unit: str
    bar: float | None
    met: bool | None
    roofline: float | None
    fraction: float | None


# An 8B-parameter decoder layer: hidden size, heads, kv heads, head_dim, intermediate size.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 8, 128, 14336
LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}


class Stopwatch:
    """Median seconds of one call within a share of the time allowed: of CPU, where nothing else is said."""

    def __init__(self, seconds: float) -> None:
        self._each = seconds

    def __call__(self, *calls: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
        """Several calls are taken in turn, each on data of its own, so that none finds its data in cache."""
        for call in calls[:2]:
            call()
        taken: list[float] = []
        end = time.monotonic() + self._each
        while len(taken) < 3 or (time.monotonic() < end and len(taken) < 1000):
            call = calls[len(taken) % len(calls)]
            start = clock()
            call()
            taken.append(clock() - start)
        return float(np.median(taken))


def random_int8(rng: np.random.Generator, *shape: int) -> Array:
    """Operands of any shape."""
    return rng.integers(-127, 128, shape, dtype=np.int8)


def random_field(rng: np.random.Generator, *shape: int) -> Array:
    """Field elements; not from the system's generator, so for measuring alone."""
    return rng.integers(0, P, shape, dtype=np.uint64)


def _lower_is_better(name: str, value: float, unit: str, bar: float | None, roofline: float | None) -> Result:
    applies = bar is not None and kernels.active_isa() == "amx"
    return {
        "name": name, "value": value, "unit": unit, "bar": bar,
        "met": value <= bar if applies and bar is not None else None,
        "roofline": roofline, "fraction": roofline / value if roofline else None,
    }  # fmt: skip


def _higher_is_better(name: str, value: float, unit: str, bar: float | None, roofline: float | None) -> Result:
    applies = bar is not None and kernels.active_isa() == "amx"
    return {
        "name": name, "value": value, "unit": unit, "bar": bar,
        "met": value >= bar if applies and bar is not None else None,
        "roofline": roofline, "fraction": value / roofline if roofline else None,
    }  # fmt: skip


def _limits(watch: Stopwatch) -> tuple[float, float, list[Result]]:
    """(GB/s of one core reading memory, 1e9 int8 multiply-adds per second on registers, their lines)."""
    words = np.ones(1 << 25, np.uint64)
    bandwidth = words.nbytes / watch(lambda: kernels.read_words(words)) / 1e9
    rounds = 500_000
    macs = kernels.peak_products(rounds)
    peak = macs / watch(lambda: kernels.peak_products(rounds)) / 1e9 if macs else math.nan
    return bandwidth, peak, [
        _higher_is_better("memory.streaming_read", bandwidth, "GB/s", None, None),
        _higher_is_better("peak.int8_products", peak, "GMAC/s", None, None),
    ]  # fmt: skip


def _copies(watch: Stopwatch, threads: int, bandwidth: float) -> list[Result]:
    """Claims on their way into private memory, 128 MiB in one message: with one thread, and with all of them."""
    shared, out = np.ones(1 << 27, np.uint8), np.zeros(1 << 27, np.uint8)

    def copy() -> object:
        return kernels.copy_in(out, 0, shared, 0, shared.nbytes)

    one = shared.nbytes / watch(copy) / 1e9
    kernels.set_threads(threads)
    try:
        every = shared.nbytes / watch(copy, clock=time.perf_counter) / 1e9
    finally:
        kernels.set_threads(1)
    return [
        _higher_is_better("copy_in.one_thread", one, "GB/s", None, bandwidth),
        _higher_is_better("copy_in.all_threads", every, "GB/s", None, None),
    ]


def _linear_checks(watch: Stopwatch, rng: np.random.Generator, bandwidth: float) -> list[Result]:
    # 64 rows of 2048 claims: half a MiB, and a short input so that the claims' side is what is timed.
    def check(rows: int, out: int, inputs: int) -> tuple[float, int]:
        y = rng.integers(-(2**31), 2**31 - 1, (rows, out), dtype=np.int32)
        r, a, u = random_field(rng, 2, out), random_int8(rng, rows, inputs), random_field(rng, 2, inputs)
        return watch(lambda: kernels.linear_check(y, r, a, u)), y.size

    seconds, claims = check(64, 2048, 64)
    small = seconds / claims * 1e9
    seconds, claims = check(1024, 32768, 64)
    streamed = 4 * claims / seconds / 1e9
    return [
        _lower_is_better("linear_check.l2", small, "ns/int32", 0.13, None),
        _higher_is_better("linear_check.dram", streamed, "GB/s", 0.75 * bandwidth, bandwidth),
    ]


def _products(watch: Stopwatch, rng: np.random.Generator, bandwidth: float, peak: float) -> list[Result]:
    w, a = kernels.pack(random_int8(rng, 4096, 4096)), random_int8(rng, 256, 4096)
    rate = 256 * 4096 * 4096 / watch(lambda: kernels.gemm_packed(w, a)) / 1e9
    wide, one = kernels.pack(random_int8(rng, 49152, 4096)), random_int8(rng, 1, 4096)
    few = wide.nbytes / watch(lambda: kernels.gemm_packed(wide, one)) / 1e9
    chunk, r, u = random_int8(rng, 4096, 4096), random_field(rng, 4, 4096), np.zeros((4, 4096), np.uint64)
    keys = chunk.nbytes / watch(lambda: kernels.project_weights(chunk, r, u)) / 1e9
    return [
        _higher_is_better("gemm.4096x4096.rows256", rate, "GMAC/s", 0.6 * peak, peak),
        _higher_is_better("gemm.one_row", few, "GB/s", None, bandwidth),
        _higher_is_better("key_generation.two_key_sets", keys, "GB/s", None, bandwidth),
    ]


def _attention(watch: Stopwatch, rng: np.random.Generator, peak: float) -> list[Result]:
    results = []
    for d, bar in ((128, 0.40), (64, 0.36)):
        # A chunk of 512 queries in the middle of 6,144 positions, 8 heads over 2 kv heads.
        cache, start, tokens, heads = RandomPages(rng, 3328, 2, d), 2816, 512, 8
        q, scale = random_int8(rng, tokens, heads, d), np.full((tokens, heads), 2e-3, np.float32)
        scores = heads * sum(start + i + 1 for i in range(tokens))

        def replay(c: RandomPages = cache, q: Array = q, scale: Array = scale, start: int = start) -> object:
            return kernels.attention_replay(q, scale, c.k, c.k_scale, c.g, c.table, start)

        def full(c: RandomPages = cache, q: Array = q, scale: Array = scale, start: int = start) -> object:
            return kernels.attention(q, scale, c.k, c.k_scale, c.v, c.table, start)

        floor = d / peak
        results += [
            _lower_is_better(f"attention_replay.6k.d{d}", watch(replay) / scores * 1e9, "ns/score", bar, floor),
            _lower_is_better(f"attention_full.6k.d{d}", watch(full) / scores * 1e9, "ns/score", None, floor),
        ]
    return results


class RandomPages:
    """Random pages of one sequence and layer."""

    def __init__(self, rng: np.random.Generator, keys: int, kv_heads: int, d: int) -> None:
        pages = -(-keys // PAGE)
        self.table = np.arange(pages, dtype=np.int32)
        self.k, self.v = random_int8(rng, pages, kv_heads, PAGE, d), random_int8(rng, pages, kv_heads, PAGE, d)
        self.k_scale = np.full((pages, kv_heads, PAGE), 1e-3, np.float32)
        self.g = random_field(rng, pages, kv_heads, PAGE, 2)


class _Layer:
    """One layer of an 8B-shaped model as the verifier and as `full-tee` see it."""

    def __init__(self, rng: np.random.Generator, tokens: int, start: int) -> None:
        f = np.float32
        self.tokens, self.start = tokens, start
        self.r = {n: random_field(rng, 2, out) for n, (out, _) in LINEARS.items()}
        self.u = {n: random_field(rng, 2, inp) for n, (_, inp) in LINEARS.items()}
        self.scale = {n: np.full(out, 1e-3, f) for n, (out, _) in LINEARS.items()}
        self.claims = {
            n: rng.integers(-100_000, 100_000, (tokens, out), dtype=np.int32) for n, (out, _) in LINEARS.items()
        }
        self.x = rng.standard_normal((tokens, HIDDEN)).astype(f)
        self.cos, self.sin = np.ones((tokens, HEAD_DIM // 2), f), np.zeros((tokens, HEAD_DIM // 2), f)
        self.v_scale = np.full(KV_HEADS, 0.05, f)
        self.w = random_field(rng, KV_HEADS, 2, HEAD_DIM)
        self.o = rng.integers(-(2**37), 2**37, (tokens, HEADS, HEAD_DIM), dtype=np.int64)
        self.cache = RandomPages(rng, start + tokens, KV_HEADS, HEAD_DIM)
        self.q_r, self.c = random_field(rng, 2, start + tokens), random_field(rng, KV_HEADS, 2, HEAD_DIM)
        decode = tokens == 1
        self.scores = rng.integers(-(10**5), 10**5, (HEADS, 1, start + 1), dtype=np.int32) if decode else None

    def run(
        self,
        linear: Callable[[str, Array], Array],
        attention: Callable[[Array, Array, Array, Array], tuple[Array, Array]],
    ) -> Array:
        """The layer, with its two operations supplied: as in spec.forward."""
        eps = np.float32(1e-5)
        a, s = kernels.norm_quantise(self.x, eps)
        q, q_scale, k, _, v = kernels.qkv_epilogue(
            linear("qkv", a), s, self.scale["qkv"], None, self.cos, self.sin, self.v_scale, HEADS, KV_HEADS, HEAD_DIM
        )
        o, row_sum = attention(q, q_scale, k, v)
        a, s = kernels.attention_epilogue(o, row_sum, self.v_scale)
        x = kernels.residual_add(self.x, linear("o", a), s, self.scale["o"])
        a, s = kernels.norm_quantise(x, eps)
        a, s = kernels.mlp_epilogue(linear("gate_up", a), s, self.scale["gate_up"])
        return kernels.residual_add(x, linear("down", a), s, self.scale["down"])

    def trusted(self) -> Array:
        """The verifier's work: checks of random claims (which fail, at the same cost) and everything elementwise."""

        def linear(name: str, a: Array) -> Array:
            kernels.linear_check(self.claims[name], self.r[name], a, self.u[name])
            return self.claims[name]

        def attention(q: Array, q_scale: Array, k: Array, v: Array) -> tuple[Array, Array]:
            c = self.cache
            kernels.value_projection(v, self.w)
            if self.scores is None:
                row_sum, _ = kernels.attention_replay(q, q_scale, c.k, c.k_scale, c.g, c.table, self.start)
            else:
                kernels.key_projection(k, self.q_r, self.start, self.c.copy())
                _, row_sum, _ = kernels.attention_transfer(
                    self.scores, q, q_scale, k, self.c, self.q_r, c.k_scale, c.g, c.table, self.start
                )
            kernels.project_outputs(self.o, self.w)
            return self.o, row_sum

        return self.run(linear, attention)

    def full(self, weights: dict[str, kernels.PackedLinear]) -> Array:
        """The same layer computed here."""

        def attention(q: Array, q_scale: Array, k: Array, v: Array) -> tuple[Array, Array]:
            c = self.cache
            return kernels.attention(q, q_scale, c.k, c.k_scale, c.v, c.table, self.start)

        return self.run(lambda name, a: kernels.gemm_packed(weights[name], a), attention)


def _layers(watch: Stopwatch, rng: np.random.Generator) -> list[Result]:
    weights = {name: kernels.pack(random_int8(rng, *shape)) for name, shape in LINEARS.items()}
    results = []
    # The mean cost per token of a 6,144-token prefill is that of a chunk in its middle.
    chunk = _Layer(rng, 256, 3072 - 128)
    trusted, full = watch(chunk.trusted), watch(lambda: chunk.full(weights))
    results += [
        _lower_is_better("layer_8b.prefill_6k.trusted", trusted / 256 * 1e6, "us/token", None, None),
        _lower_is_better("layer_8b.prefill_6k.full_tee", full / 256 * 1e6, "us/token", None, None),
        _lower_is_better("layer_8b.prefill_6k.ratio", trusted / full, "trusted/full-tee", 0.40, None),
    ]
    # Twelve layers' worth of keys and challenges in turn: more than a cache holds, as in a real model.
    steps = [_Layer(rng, 1, 10_000) for _ in range(12)]
    trusted = watch(*(step.trusted for step in steps))
    full = watch(*((lambda step=step: step.full(weights)) for step in steps))
    results += [
        _lower_is_better("layer_8b.decode_10k.trusted", trusted * 1e6, "us/token", None, None),
        _lower_is_better("layer_8b.decode_10k.full_tee", full * 1e6, "us/token", None, None),
        _lower_is_better("layer_8b.decode_10k.ratio", trusted / full, "trusted/full-tee", 1 / 50, None),
    ]
    return results


def run(seconds: float = 20.0) -> list[Result]:
    """Measure for about `seconds` (and as long again to make data). One thread, but for copies in wall time; the thread
    count is given back."""
    rng = np.random.default_rng(1)
    watch = Stopwatch(seconds / 19)
    threads = kernels.get_threads()
    kernels.set_threads(1)
    try:
        bandwidth, peak, results = _limits(watch)
        results += _copies(watch, threads, bandwidth)
        peak_or_nan = peak if math.isfinite(peak) else math.nan
        results += _linear_checks(watch, rng, bandwidth)
        results += _products(watch, rng, bandwidth, peak_or_nan)
        results += _attention(watch, rng, peak_or_nan)
        results += _layers(watch, rng)
    finally:
        kernels.set_threads(threads)
    return [_finite(r) for r in results]


def _finite(result: Result) -> Result:
    """NaN (no such limit on this instruction set) becomes None, for JSON."""
    for key in ("bar", "roofline", "fraction"):
        value = result[key]
        if isinstance(value, float) and not math.isfinite(value):
            result[key] = None
    return result
