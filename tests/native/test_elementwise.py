"""Elementwise kernels against the NumPy reference, bit for bit, on every instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veriattn.errors import InternalError, NumericsError
from veriattn.native import kernels
from veriattn.spec import reference

EXACT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32 - 1)
SPECIAL = np.array(
    [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 126.5, 127.0, -127.5, 1e-45, -1e-45, 1.17549421e-38, 2.0**-20, 2.0**-21, 2.0**39,
     -(2.0**39) * 1.9999998, 1.0, -1.0, 3.4e-39, 1e10],
    dtype=np.float32,
)  # fmt: skip


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    """Bits of the results, or the error's code."""
    try:
        with np.errstate(all="ignore"):
            r = f(*args)
    except NumericsError as e:
        return e.code
    return [(a.shape, a.dtype.str, a.tobytes()) for a in (r if isinstance(r, tuple) else (r,))]


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Mixed magnitudes, exact halves after scaling, subnormals, and now and then a special value."""
    x = rng.standard_normal(shape).astype(np.float32) * np.float32(2.0 ** rng.integers(-30, 30))
    kind = rng.integers(4)
    if kind == 1:
        x = (rng.integers(-254, 255, shape) / 2).astype(np.float32)
        x.flat[0] = 127.0
    elif kind == 2:
        x = rng.choice(SPECIAL, shape)
    return np.ascontiguousarray(x)


def claims(rng: np.random.Generator, *shape: int) -> np.ndarray:
    high = int(rng.choice([2, 100, 2**20, 2**31 - 1]))
    y = rng.integers(-high, high, shape, dtype=np.int32, endpoint=True)
    if rng.integers(3) == 0:
        y.flat[:: max(1, y.size // 5)] = rng.choice(np.array([0, -(2**31), 2**31 - 1], np.int32))
    return y


def scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (2.0 ** rng.uniform(-20, 3, shape)).astype(np.float32)


@EXACT
@given(seed=SEEDS, tokens=st.integers(0, 5), n=st.integers(1, 150))
def test_norm_and_quantise(isa: str, seed: int, tokens: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = floats(rng, tokens, n) if tokens else np.empty((0, n), np.float32)
    eps = np.float32(rng.choice([1e-5, 1e-6, 2.0**-60]))
    assert outcome(kernels.norm_quantise, x, eps) == outcome(reference.norm_quantise, x, eps)
    assert outcome(kernels.quantise, x) == outcome(reference.quantise, x)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 2.0**40, -(2.0**40), 3e38])
@pytest.mark.parametrize("at", [0, 7, 16, 66])
def test_outside_the_domain_is_an_error(isa: str, bad: float, at: int) -> None:
    x = np.ones((3, 67), np.float32)
    for f in (kernels.quantise, lambda v: kernels.norm_quantise(v, np.float32(1e-5))):
        f(x)
        y = x.copy()
        y[1, at] = bad
        with pytest.raises(NumericsError):
            f(y)
    below = x.copy()
    below[1, at] = np.nextafter(np.float32(2.0**40), np.float32(0))
    assert outcome(kernels.quantise, below) == outcome(reference.quantise, below)


@EXACT
@given(
    seed=SEEDS, tokens=st.integers(1, 4), kv=st.integers(1, 3), group=st.integers(1, 3),
    d=st.sampled_from([2, 6, 8, 16, 24, 64, 80, 96, 128]), options=st.integers(0, 7), rotary=st.integers(0, 1),
)  # fmt: skip
def test_qkv_epilogue(isa: str, seed: int, tokens: int, kv: int, group: int, d: int, options: int, rotary: int) -> None:
    rng = np.random.default_rng(seed)
    heads = kv * group
    cols = (heads + 2 * kv) * d
    half = d // 2 if rotary else max(1, d // 4)
    angle = rng.uniform(0, 100, (tokens, half))
    bias = floats(rng, cols) if options & 1 else None
    center = floats(rng, kv, d) if options & 2 else None
    q_norm, k_norm = (scales(rng, d), scales(rng, d)) if options & 4 else (None, None)
    args = (
        claims(rng, tokens, cols), scales(rng, tokens), scales(rng, cols), bias,
        np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), scales(rng, kv), heads, kv, d,
        center, q_norm, k_norm, np.float32(1e-5),
    )  # fmt: skip
    assert outcome(kernels.qkv_epilogue, *args) == outcome(reference.qkv_epilogue, *args)


@EXACT
@given(seed=SEEDS, tokens=st.integers(1, 4), kv=st.integers(1, 3), group=st.integers(1, 3), d=st.integers(1, 130))
def test_attention_epilogue(isa: str, seed: int, tokens: int, kv: int, group: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    limit = int(rng.choice([100, 2**24, 2**38]))
    o = rng.integers(-limit, limit, (tokens, kv * group, d), dtype=np.int64)
    row_sum = rng.integers(16336, 2**31 - 1, (tokens, kv * group), dtype=np.int32)
    args = (o, row_sum, scales(rng, kv))
    assert outcome(kernels.attention_epilogue, *args) == outcome(reference.attention_epilogue, *args)


@EXACT
@given(seed=SEEDS, tokens=st.integers(1, 4), n=st.sampled_from([1, 3, 8, 24, 64, 100, 192, 256, 1536]))
def test_mlp_epilogue(isa: str, seed: int, tokens: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    args = (claims(rng, tokens, 2 * n), scales(rng, tokens), scales(rng, 2 * n))
    assert outcome(kernels.mlp_epilogue, *args) == outcome(reference.mlp_epilogue, *args)


def test_silu_over_its_whole_range(isa: str) -> None:
    # One claim per gate, scaled so that every octave and the clamps at +-48 are met.
    y = np.arange(-(2**15), 2**15, dtype=np.int32).reshape(1, -1)
    w_scale = np.full(2 * y.size, 2.0**-9, np.float32)
    args = (np.concatenate([y, np.full_like(y, 3)], axis=1), np.float32([1.0]), w_scale)
    assert outcome(kernels.mlp_epilogue, *args) == outcome(reference.mlp_epilogue, *args)


@EXACT
@given(seed=SEEDS, tokens=st.integers(0, 4), n=st.integers(1, 100), with_bias=st.booleans())
def test_residual_and_logits(isa: str, seed: int, tokens: int, n: int, with_bias: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = floats(rng, max(tokens, 1), n)[:tokens], claims(rng, max(tokens, 1), n)[:tokens]
    a, w, bias = scales(rng, tokens), scales(rng, n), floats(rng, n) if with_bias else None
    assert outcome(kernels.residual_add, x, y, a, w, bias) == outcome(reference.residual_add, x, y, a, w, bias)
    assert outcome(kernels.logits, y, a, w) == outcome(reference.logits, y, a, w)


def test_same_bits_for_any_thread_count(isa: str) -> None:
    rng = np.random.default_rng(5)
    x = floats(rng, 300, 576)
    before = kernels.get_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            kernels.set_threads(threads)
            results.append(outcome(kernels.norm_quantise, x, np.float32(1e-5)))
    finally:
        kernels.set_threads(before)
    assert results[0] == results[1] == results[2] == outcome(reference.norm_quantise, x, np.float32(1e-5))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "fesetround"), reason="no fesetround")
def test_rounding_mode_of_the_caller_does_not_matter(isa: str) -> None:
    libm = ctypes.CDLL("libm.so.6")
    x = floats(np.random.default_rng(6), 4, 97)
    expected = outcome(reference.quantise, x)
    upward, nearest = 0x800, 0x0
    assert libm.fesetround(upward) == 0
    try:
        got = outcome(kernels.quantise, x)
        assert libm.fegetround() == upward  # given back as it was
    finally:
        libm.fesetround(nearest)
    assert got == expected


def test_refuses_wrong_arguments() -> None:
    x = np.ones((4, 64), np.float32)
    y, a, w = np.ones((4, 64), np.int32), np.ones(4, np.float32), np.ones(64, np.float32)
    kernels.residual_add(x, y, a, w)
    for bad in (
        (x.astype(np.float64), y, a, w), (x[:, ::2], y[:, ::2], a, w[:32]), (x, y.astype(np.int64), a, w),
        (x, y, a[:3], w), (x, y, a, w[:63]), (x[:3], y, a, w), (x, y[None], a, w), (x, None, a, w), (x, y, a, "w"),
        (x.T, y.T, a, w), (x.astype(">f4"), y, a, w),
    ):  # fmt: skip
        with pytest.raises(InternalError):
            kernels.residual_add(*bad)
    with pytest.raises(InternalError):
        kernels.norm_quantise(np.empty((3, 0), np.float32), np.float32(1e-5))
    raw = np.zeros(4 * 64 * 4 + 1, np.uint8)
    misaligned = np.frombuffer(raw.data, np.float32, 4 * 64, offset=1 if raw.ctypes.data % 4 == 0 else 0).reshape(4, 64)
    with pytest.raises(InternalError):
        kernels.quantise(misaligned)
