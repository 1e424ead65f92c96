"""What this machine's kernels, memory and devices do alone: the rates that rooflines are computed from."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from veriattn.bench.kernels import RandomPages, random_field, random_int8
from veriattn.bench.roofline import LinkRates, Rates, ScoreRates, SideRates
from veriattn.errors import ConfigError
from veriattn.native import kernels
from veriattn.native.partial import share_outputs_into, share_scores_into
from veriattn.spec.model import ModelConfig
from veriattn.verifier.tiling import SCORE_BYTES
from veriattn.wire.emulate import Throttle

#: Rows and keys at which score kernels are timed: a chunk in the middle of a long prompt, and one row of a long answer.
_MANY = (256, 3072)
_ONE = (1, 6144)


class _Best:
    """Least seconds of a call within the time allowed for it; the first call is not counted."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        best, end, count = math.inf, time.monotonic() + self._seconds, 0
        while count < 2 or (time.monotonic() < end and count < 1000):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
            count += 1
        return best


def cpu_side(c: ModelConfig, threads: int, seconds: float = 4.0) -> SideRates:
    """Rates of the native kernels at a shape, with so many threads, in about `seconds`. The thread count is given back."""
    before = kernels.get_threads()
    kernels.set_threads(threads)
    try:
        return _measure(c, _Best(seconds / 20), np.random.default_rng(1), threads)
    finally:
        kernels.set_threads(before)


def _measure(c: ModelConfig, best: _Best, rng: np.random.Generator, threads: int) -> SideRates:
    rows, width = 256, c.hidden_size
    out = min(2 * c.intermediate_size, 8192)
    weights, a = kernels.pack(random_int8(rng, out, width)), random_int8(rng, rows, width)
    macs = rows * out * width / best(lambda: kernels.gemm_packed(weights, a))
    read, copy = _memory(best, threads)
    # Half a MiB of claims for each thread: from its own cache, and enough that waking it does not count.
    y = rng.integers(-(2**31), 2**31 - 1, (64 * threads, 2048), dtype=np.int32)
    r, short, u = random_field(rng, 2, 2048), random_int8(rng, len(y), 64), random_field(rng, 2, 64)
    check = best(lambda: kernels.linear_check(y, r, short, u)) / y.size
    # One head's rows are too few for many threads.
    many = _scores(c, best, rng, *_MANY, kv=min(threads, c.num_kv_heads))
    one = _scores(c, best, rng, *_ONE, kv=c.num_kv_heads)
    token = _token(c, best, rng, max(rows, 64 * threads))
    return SideRates(macs, read, copy, check, token, _token(c, best, rng, 1), many, one)


def _memory(best: _Best, threads: int) -> tuple[float, float]:
    """Bytes a second of so many threads: of reading, and of copying as claims are copied in."""
    words = np.ones(1 << (24 if threads == 1 else 26), np.uint64)
    parts = np.array_split(words, threads)
    with ThreadPoolExecutor(threads) as pool:
        read = words.nbytes / best(lambda: list(pool.map(kernels.read_words, parts)))
    there = np.zeros_like(words)
    return read, words.nbytes / best(lambda: kernels.copy_in(there, 0, words, 0, words.nbytes))


def _scores(c: ModelConfig, best: _Best, rng: np.random.Generator, rows: int, keys: int, kv: int) -> ScoreRates:
    group, d = c.num_heads // c.num_kv_heads, c.head_dim
    heads = group * kv
    p = RandomPages(rng, keys, kv, d)
    q, q_scale = random_int8(rng, rows, heads, d), np.full((rows, heads), 2e-3, np.float32)
    start = keys - rows
    visible = heads * (rows * start + rows * (rows + 1) // 2)

    def attend() -> object:
        return kernels.attention(q, q_scale, p.k, p.k_scale, p.v, p.table, start)

    def replay() -> object:
        return kernels.attention_replay(q, q_scale, p.k, p.k_scale, p.g, p.table, start)

    # Scores are held for so many rows at a time as `tsdp` holds them.
    some = min(rows, max(1, SCORE_BYTES // (4 * heads * keys)))
    few, few_scale, k = q[:some].copy(), q_scale[:some].copy(), random_int8(rng, some, kv, d)
    scores = np.empty((heads, some, keys), np.int32)
    share_scores_into(scores, 0, keys, few, p.k, p.table)
    weights = kernels.attention_weights_paged(scores, few_scale, p.k_scale, p.table, keys - some)
    sums, challenges = random_field(rng, kv, 2, d), random_field(rng, 2, keys)
    o = np.zeros((some, heads, d), np.int64)

    def transfer() -> object:
        return kernels.attention_transfer(
            scores, few, few_scale, k, sums, challenges, p.k_scale, p.g, p.table, keys - some
        )

    def softmax() -> object:
        return kernels.attention_weights_paged(scores, few_scale, p.k_scale, p.table, keys - some)

    return ScoreRates(
        attend=best(attend) / visible,
        replay=best(replay) / visible,
        transfer=best(transfer) / scores.size,
        softmax=best(softmax) / scores.size,
        qk=best(lambda: share_scores_into(scores, 0, keys, few, p.k, p.table)) / scores.size,
        pv=best(lambda: share_outputs_into(o, weights, 0, keys, p.v, p.table)) / scores.size,
    )


def _token(c: ModelConfig, best: _Best, rng: np.random.Generator, rows: int) -> float:
    """Seconds per token of everything elementwise in a layer."""
    f, half = np.float32, c.rotary_dim // 2
    x = rng.standard_normal((rows, c.hidden_size)).astype(f)
    cos, sin, v_scale = np.ones((rows, half), f), np.zeros((rows, half), f), np.full(c.num_kv_heads, 0.05, f)

    def claims(out: int) -> Any:
        return rng.integers(-100_000, 100_000, (rows, out), dtype=np.int32), np.full(out, 1e-3, f)

    qkv, o = claims(c.qkv_size), rng.integers(-(2**37), 2**37, (rows, c.num_heads, c.head_dim), dtype=np.int64)
    row_sum = np.full((rows, c.num_heads), 1 << 24, np.int32)
    hidden, gate_up, eps = claims(c.hidden_size), claims(2 * c.intermediate_size), f(1e-5)

    def layer() -> None:
        _, s = kernels.norm_quantise(x, eps)
        kernels.qkv_epilogue(qkv[0], s, qkv[1], None, cos, sin, v_scale, c.num_heads, c.num_kv_heads, c.head_dim)
        _, s = kernels.attention_epilogue(o, row_sum, v_scale)
        y = kernels.residual_add(x, hidden[0], s, hidden[1])
        _, s = kernels.norm_quantise(y, eps)
        _, s = kernels.mlp_epilogue(gate_up[0], s, gate_up[1])
        kernels.residual_add(y, hidden[0], s, hidden[1])

    return best(layer) / rows


def measure(
    c: ModelConfig, device: str, threads: int, prover_threads: int, link: Throttle | None, seconds: float = 4.0
) -> Rates:
    """Rates of both sides and of what is between them. Raises: ConfigError where a device cannot be measured."""
    tee = cpu_side(c, threads, seconds)
    cores = len(os.sched_getaffinity(0))
    if device == "cpu":
        prover = tee if prover_threads == threads else cpu_side(c, prover_threads, seconds)
        rates = Rates(tee, prover, LinkRates(), threads, prover_threads, cores)
    else:
        figures = device_figures(device)
        rates = Rates(tee, device_side(c, figures), device_link(figures), threads, None, cores)
    return rates if link is None else with_link(rates, link)


def with_link(rates: Rates, link: Throttle) -> Rates:
    """The same sides over an emulated link (or over the real one where that is slower)."""
    own = rates.link
    slower = LinkRates(
        min(own.to_prover, link.bytes_per_s), min(own.from_prover, link.bytes_per_s), link.latency_us * 1e-6
    )
    return Rates(rates.tee, rates.prover, slower, rates.tee_threads, rates.prover_threads, rates.cores)


def device_figures(device: str) -> dict[str, float]:
    """What `python -m veriattn.bench.device` measures in a process of its own: nothing here imports torch.

    Raises: ConfigError.
    """
    command = [sys.executable, "-m", "veriattn.bench.device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"device {device} cannot be measured: {last}", hint="`veriattn doctor` says what there is")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def device_side(c: ModelConfig, figures: dict[str, float]) -> SideRates:
    """A device's rates from its four figures: what it does elementwise is bound by its memory."""
    macs, read, d = figures["macs_per_s"], figures["read_bytes_per_s"], c.head_dim
    touched = 4 * (c.qkv_size + 2 * c.hidden_size + 2 * c.intermediate_size) + 8 * c.attention_size
    scores = ScoreRates(attend=3 * d / macs, replay=0.0, transfer=0.0, softmax=0.0, qk=d / macs, pv=2 * d / macs)
    return SideRates(macs, read, math.inf, 0.0, touched / read, touched / read, scores, scores)


def device_link(figures: dict[str, float]) -> LinkRates:
    """The bus to a device."""
    return LinkRates(figures["to_device_bytes_per_s"], figures["from_device_bytes_per_s"])
