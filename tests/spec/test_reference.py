"""Every operation against the specification in plain Python, bit for bit; where it ends; what never comes up."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.spec import oracle

from veriattn.errors import NumericsError
from veriattn.spec import constants, reference
from veriattn.spec.kv import PAGE

EXACT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def f32(x: float) -> float:
    value: float = struct.unpack("<f", struct.pack("<f", x))[0]
    return value


def array(x: Any, dtype: Any = np.float32) -> Any:
    return np.ascontiguousarray(np.array(x, dtype=dtype))


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    """The result, or `domain` where the function ends. Subnormal values are never an outcome."""
    try:
        return f(*args)
    except (oracle.OutsideDomain, NumericsError):
        return "domain"


def same(found: Any, expected: Any) -> None:
    """Equal as bits; -0 and 0 differ."""
    if isinstance(expected, str):
        assert isinstance(found, str) and found == expected
        return
    found = found if isinstance(found, tuple) else (found,)
    for a, b in zip(found, expected, strict=True):
        assert a.tobytes() == array(b, a.dtype).reshape(a.shape).tobytes()


# --- values that are legal at each place of the function ------------------------------------------------------------

# Activations are multiples of 2**-70 (docs/spec.md section 11); sums of dequantised values reach far above 2**40.
HALVES = [0.5, 1.5, 2.5, 126.5, 63.5, -0.5, -1.5, 127.0, -127.0, 0.0, -0.0]
EXTREME = [0.0, -0.0, 2.0**-70, -(2.0**-70), 2.0**-20, 2.0**-21, 1.0, 2.0**39, -f32(2.0**40 * (1 - 2.0**-24))]


def normal(low: float, high: float) -> st.SearchStrategy[float]:
    """binary32 values with low <= |x| <= high, of either sign, logarithmically spread."""
    magnitude = st.floats(np.log2(low), np.log2(high)).map(lambda e: f32(min(max(2.0**e, low), high)))
    return st.tuples(magnitude, st.booleans()).map(lambda p: -p[0] if p[1] else p[0])


def grid(x: float) -> float:
    """The nearest multiple of 2**-70, as all activations are."""
    return f32(round(x * 2.0**70) / 2.0**70) if abs(x) < 2.0**-40 else x


activations = st.one_of(st.sampled_from(HALVES), st.sampled_from(EXTREME), normal(2.0**-69, 2.0**39).map(grid))
near_one = st.floats(-4, 4, width=32).map(grid)
scales = normal(2.0**-20, 2.0**20).map(abs)
a_scales = normal(2.0**-27, 2.0**34).map(abs)
tables = st.one_of(st.just(0.0), normal(2.0**-30, 8.0))
offsets = st.one_of(st.just(0.0), normal(2.0**-30, 2.0**20))
eps = st.sampled_from([f32(1e-5), f32(1e-6), 2.0**-60, f32(0.1)])
claims = st.one_of(
    st.sampled_from([0, 1, -1, 2**31 - 2, -(2**31) + 2, 2**24 + 1, 2**24 + 3]), st.integers(-(2**31) + 1, 2**31 - 1)
)
int8s = st.one_of(st.sampled_from([-127, 0, 127]), st.integers(-127, 127))


def vectors(values: st.SearchStrategy[Any], low: int = 1, high: int = 40) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=low, max_size=high)


def exactly(values: st.SearchStrategy[Any], n: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=n, max_size=n)


# --- quantisation -----------------------------------------------------------------------------------------------------


@EXACT
@given(x=st.one_of(vectors(activations), vectors(near_one)), eps=eps)
@example(x=[127.0, 0.5, 1.5, 2.5, -0.5, -2.5, 126.5], eps=2.0**-60)
@example(x=[0.0], eps=2.0**-60)
@example(x=[-0.0, 2.0**-70], eps=2.0**-60)
@example(x=[2.0**-20, 2.0**-21, -(2.0**-21)], eps=2.0**-60)
def test_quantise_and_norm(kernels: ModuleType, x: list[float], eps: float) -> None:
    rows = array([x, x[::-1]])
    for f, args, expected in (
        (kernels.quantise, (), [oracle.quantise(r) for r in (x, x[::-1])]),
        (kernels.norm_quantise, (np.float32(eps),), [oracle.norm_quantise(r, eps) for r in (x, x[::-1])]),
    ):
        same(f(rows, *args), ([e[0] for e in expected], [e[1] for e in expected]))


@EXACT
@given(x=vectors(activations, 4, 4), weight=exactly(offsets, 4), eps=eps)
def test_head_norm(x: list[float], weight: list[float], eps: float) -> None:
    found = reference.head_norm(array(x).reshape(1, 1, 4), array(weight), np.float32(eps))
    same(found, [oracle.head_norm(x, weight, eps)])


def test_norm_of_equal_elements_is_as_defined() -> None:
    a, scale = reference.norm_quantise(array([[3.0] * 8]), np.float32(2.0**-60))
    assert a.tolist() == [[127] * 8]
    # rms of equal elements is their size: 127 * scale is 1 but for roundings.
    assert abs(float(scale[0]) * 127 - 1) < 2e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**40, -(2.0**40), 3e38])
def test_the_domain_ends(kernels: ModuleType, bad: float) -> None:
    inside = np.full((2, 19), 2.0**40 * (1 - 2.0**-24), np.float32)
    kernels.quantise(inside)
    kernels.norm_quantise(inside, np.float32(1e-5))
    for at in (0, 9, 18):
        outside = inside.copy()
        outside[1, at] = bad
        with pytest.raises(NumericsError):
            kernels.quantise(outside)
        with pytest.raises(NumericsError):
            kernels.norm_quantise(outside, np.float32(1e-5))


# --- linear -----------------------------------------------------------------------------------------------------------


@EXACT
@given(data=st.data(), tokens=st.integers(1, 3), inp=st.integers(1, 70), out=st.integers(1, 20))
def test_linear(kernels: ModuleType, data: st.DataObject, tokens: int, inp: int, out: int) -> None:
    a = data.draw(exactly(exactly(int8s, inp), tokens))
    w = [data.draw(exactly(int8s, inp))] * out if out > 3 else data.draw(exactly(exactly(int8s, inp), out))
    expected = ([oracle.linear(row, w) for row in a],)
    a_i8, w_i8 = array(a, np.int8), array(w, np.int8)
    same(kernels.gemm_i8(a_i8, w_i8), expected)
    same(kernels.gemm_packed(kernels.pack(w_i8), a_i8), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_linear_at_its_extreme(kernels: ModuleType, sign: int) -> None:
    n = constants.MAX_IN_FEATURES
    a, w = np.full((2, n), 127, np.int8), np.full((3, n), sign * 127, np.int8)
    assert np.array_equal(kernels.gemm_packed(kernels.pack(w), a), np.full((2, 3), sign * 127 * 127 * n, np.int32))


@EXACT
@given(data=st.data(), n=st.integers(1, 20), with_bias=st.booleans())
def test_dequantise_and_residual(kernels: ModuleType, data: st.DataObject, n: int, with_bias: bool) -> None:
    y, w = data.draw(exactly(claims, n)), data.draw(exactly(scales, n))
    scale, x = data.draw(a_scales), data.draw(exactly(activations, n))
    bias = data.draw(exactly(offsets, n)) if with_bias else None
    v = oracle.dequantise(y, w, scale, bias)
    args = (array([y], np.int32), array([scale]), array(w))
    bias_f32 = None if bias is None else array(bias)
    same(kernels.residual_add(array([x]), *args, bias_f32), ([oracle.fl(p + q) for p, q in zip(x, v, strict=True)],))
    if bias is None:
        same(kernels.logits(*args), (v,))


# --- q, k, v ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "rotary_dim"), [(2, 2), (12, 12), (12, 6), (16, 16), (20, 4), (5, 4)])
@settings(EXACT, max_examples=25)
@given(data=st.data())
def test_qkv(kernels: ModuleType, d: int, rotary_dim: int, data: st.DataObject) -> None:
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]))
    rows = (heads + 2 * kv_heads) * d
    small = data.draw(st.booleans())
    y = data.draw(exactly(st.integers(-1000, 1000) if small else claims, rows))
    w_scale = data.draw(exactly(normal(2.0**-9, 2.0**-3).map(abs) if small else scales, rows))
    a_scale = data.draw(normal(2.0**-6, 1.0).map(abs) if small else a_scales)
    bias = data.draw(st.one_of(st.none(), exactly(offsets, rows)))
    cos, sin = data.draw(exactly(tables, rotary_dim // 2)), data.draw(exactly(tables, rotary_dim // 2))
    v_scale = data.draw(exactly(scales, kv_heads))
    center = data.draw(st.one_of(st.none(), exactly(exactly(offsets, d), kv_heads)))
    norm = data.draw(st.booleans())
    q_norm = data.draw(exactly(offsets, d)) if norm else None
    k_norm = data.draw(exactly(offsets, d)) if norm else None
    e = data.draw(eps)
    expected = outcome(
        oracle.qkv, y, a_scale, w_scale, bias, cos, sin, v_scale, heads, kv_heads, d, center, q_norm, k_norm, e
    )
    none_or = [None if v is None else array(v) for v in (bias, center, q_norm, k_norm)]
    found = outcome(
        kernels.qkv_epilogue, array([y], np.int32), array([a_scale]), array(w_scale), none_or[0], array([cos]),
        array([sin]), array(v_scale), heads, kv_heads, d, *none_or[1:], np.float32(e),
    )  # fmt: skip
    same(found, expected)


@pytest.mark.parametrize("n", [1, 2, 12, 24, 64, 96])
def test_hadamard_is_symmetric_and_inverts_itself(n: int) -> None:
    """On integers nothing rounds, so the algebra holds exactly."""
    block = constants.largest_power_of_two_divisor(n)
    eye = np.eye(n, dtype=np.float32)
    h = reference.hadamard(eye, block)
    assert np.array_equal(h, h.T) and np.array_equal(h @ h, block * eye)
    assert np.array_equal(np.abs(h[:block, :block]), np.ones((block, block)))
    x = [float(i * i - 7 * i) for i in range(n)]
    same(reference.hadamard(array([x]), block), (oracle.hadamard(x, block),))


def test_rotary_leaves_the_other_dimensions() -> None:
    x = array(range(10)).reshape(1, 1, 10)
    out = reference.rotary(x, array([[0.0, 1.0]]), array([[1.0, 0.0]]))
    assert out.reshape(-1).tolist() == [-2, 1, 0, 3, 4, 5, 6, 7, 8, 9]


# --- attention ----------------------------------------------------------------------------------------------------------


def paged(values: Any) -> tuple[Any, Any]:
    """Keys (keys, kv_heads, ...) in pages of shuffled order with rubbish around them, and the block table."""
    pages = -(-values.shape[0] // PAGE)
    store = np.full((pages + 2, values.shape[1], PAGE, *values.shape[2:]), 77, values.dtype)
    table = np.array([pages + 1 - i for i in range(pages)], np.int32)
    for i, page in enumerate(table):
        part = values[i * PAGE : (i + 1) * PAGE].swapaxes(0, 1)
        store[page, :, : part.shape[1]] = part
    return store, table


def attend(kernels: ModuleType, q: Any, q_scale: Any, k: Any, k_scale: Any, v: Any, start: int) -> Any:
    (k_pages, table), (scale_pages, _), (v_pages, _) = paged(k), paged(k_scale), paged(v)
    return kernels.attention(q, q_scale, k_pages, scale_pages, v_pages, table, start)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 2)])
@settings(EXACT, max_examples=30)
@given(data=st.data(), start=st.sampled_from([0, 1, 5, 30]), tokens=st.integers(1, 3), d=st.sampled_from([1, 12, 16]))
def test_attention(
    kernels: ModuleType, heads: int, kv_heads: int, data: st.DataObject, start: int, tokens: int, d: int
) -> None:
    keys = start + tokens
    q = data.draw(exactly(exactly(exactly(int8s, d), heads), tokens))
    q_scale = data.draw(exactly(exactly(normal(2.0**-34, 2.0**50).map(abs), heads), tokens))
    cache = [
        oracle.Head(
            data.draw(exactly(exactly(int8s, d), keys)),
            data.draw(exactly(normal(2.0**-27, 2.0**40).map(abs), keys)),
            data.draw(exactly(exactly(int8s, d), keys)),
        )
        for _ in range(kv_heads)
    ]
    rows = [
        [
            oracle.attention_row(q[i][h], q_scale[i][h], cache[h // (heads // kv_heads)], start + i + 1)
            for h in range(heads)
        ]
        for i in range(tokens)
    ]
    found = attend(
        kernels,
        array(q, np.int8),
        array(q_scale),
        array([h.k for h in cache], np.int8).swapaxes(0, 1).copy(),
        array([h.k_scale for h in cache]).T.copy(),
        array([h.v for h in cache], np.int8).swapaxes(0, 1).copy(),
        start,
    )
    same(found, ([[r[0] for r in row] for row in rows], [[r[1] for r in row] for row in rows]))


@pytest.mark.parametrize("start", [PAGE - 2, PAGE, 3 * PAGE - 1])
def test_attention_over_pages(kernels: ModuleType, start: int) -> None:
    rng = np.random.default_rng(start)
    keys, d = start + 3, 12
    q, k, v = (rng.integers(-127, 128, (n, 1, d), dtype=np.int8) for n in (3, keys, keys))
    q_scale, k_scale = (rng.uniform(0.001, 0.02, (n, 1)).astype(np.float32) for n in (3, keys))
    head = oracle.Head(k[:, 0].tolist(), k_scale[:, 0].tolist(), v[:, 0].tolist())
    rows = [oracle.attention_row(q[i, 0].tolist(), float(q_scale[i, 0]), head, start + i + 1) for i in range(3)]
    assert len({w for r in rows for w in r[2]}) > 20
    same(attend(kernels, q, q_scale, k, k_scale, v, start), ([[r[0]] for r in rows], [[r[1]] for r in rows]))


def test_the_longest_attention_at_its_extreme(kernels: ModuleType) -> None:
    """131,072 equal keys of full size: every partial sum of every implementation must hold."""
    keys = constants.MAX_KEYS
    q, k = np.full((1, 1, 16), 127, np.int8), np.full((keys, 1, 16), -127, np.int8)
    o, row_sum = attend(kernels, q, array([[1.0]]), k, np.ones((keys, 1), np.float32), k, keys - 1)
    assert row_sum.tolist() == [[16336 * keys]] and o.tolist() == [[[-127 * 16336 * keys] * 16]]


def test_weights_of_attention() -> None:
    assert constants.LUT15.tolist() == oracle.LUT
    # 0, just below and at a half, the last weights that are not zero, far beyond.
    t = np.array([[0, 1, 63, 64, 65, 64 * 14, 64 * 15, 10_000]], np.int32)
    p, total = reference.attention_weights(-t, array([1.0]), np.ones(8, np.float32), np.ones((1, 8), bool))
    expected = [((oracle.LUT[min(x, 960) & 63] >> (min(x, 960) >> 6)) + 1) >> 1 for x in t[0].tolist()]
    assert p.tolist() == [expected] and total.tolist() == [sum(expected)]
    assert expected[0] == 16336 and expected[3] == 8168 and expected[5] == 1 and expected[-1] == 0
    # No entry is near a tie, so that another way of computing the table gives the same one.
    exact = [32672.25 * 2 ** (-f / 64) for f in range(64)]
    assert min(abs(x - int(x) - 0.5) for x in exact) > 0.066


def test_hidden_keys_have_no_say() -> None:
    scores = np.array([[5, 1000, 3]], np.int32)
    visible = np.array([[True, False, True]])
    p, total = reference.attention_weights(scores, array([1.0]), np.ones(3, np.float32), visible)
    q, total_without = reference.attention_weights(
        scores[:, ::2], array([1.0]), np.ones(2, np.float32), visible[:, ::2]
    )
    assert p[0, 1] == 0 and p[0, ::2].tolist() == q[0].tolist() and total.tolist() == total_without.tolist()


@EXACT
@given(data=st.data(), heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), d=st.sampled_from([1, 12]))
def test_attention_output(kernels: ModuleType, data: st.DataObject, heads: tuple[int, int], d: int) -> None:
    row_sum = data.draw(exactly(st.integers(16336, 16336 * 131072), heads[0]))
    o = [data.draw(exactly(st.integers(-127 * n, 127 * n), d)) for n in row_sum]
    v_scale = data.draw(exactly(scales, heads[1]))
    a, scale = oracle.attention_output(o, row_sum, v_scale)
    same(kernels.attention_epilogue(array([o], np.int64), array([row_sum], np.int32), array(v_scale)), ([a], [scale]))


# --- MLP --------------------------------------------------------------------------------------------------------------


@settings(EXACT, max_examples=200)
@given(
    z=vectors(st.one_of(st.integers(-520, 520).map(lambda n: n / 4), st.floats(-130, 130, width=32).map(grid)), 1, 20)
)
def test_exp2(z: list[float]) -> None:
    expected = [oracle.exp2(v) for v in z]
    same(reference.exp2(array(z)), (expected,))
    for v, e in zip(z, expected, strict=True):
        exact = 2.0 ** min(max(v, -125), 125)
        assert abs(e - exact) <= 1.2e-7 * exact


@EXACT
@given(data=st.data(), n=st.sampled_from([1, 2, 12, 20, 21]), small=st.booleans())
def test_mlp(kernels: ModuleType, data: st.DataObject, n: int, small: bool) -> None:
    y = data.draw(exactly(st.integers(-3000, 3000) if small else claims, 2 * n))
    w = data.draw(exactly(normal(2.0**-9, 2.0**-2).map(abs) if small else scales, 2 * n))
    a_scale = data.draw(normal(2.0**-6, 1.0).map(abs) if small else a_scales)
    expected = outcome(oracle.mlp, y, a_scale, w)
    found = outcome(kernels.mlp_epilogue, array([y], np.int32), array([a_scale]), array(w))
    same(found, "domain" if expected == "domain" else ([expected[0]], [expected[1]]))


def test_silu_is_silu() -> None:
    g = np.linspace(-30, 30, 999).astype(np.float32)
    exact = g / (1 + np.exp(-g.astype(np.float64)))
    assert np.max(np.abs(reference.silu(g) - exact)) < 2e-6


# --- no subnormal number ----------------------------------------------------------------------------------------------


def test_the_oracle_sees_subnormals() -> None:
    with pytest.raises(oracle.Subnormal):
        oracle.fl(2.0**-127)
    with pytest.raises(oracle.Subnormal):
        oracle.dequantise([1], [2.0**-80], 2.0**-80)
    with pytest.raises(oracle.Subnormal):
        oracle.fl(2.0**-160)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_smallest_values_of_every_operation_stay_normal(data: st.DataObject) -> None:
    """Everything near its lower bound at once; the oracle raises Subnormal for any intermediate value."""
    tiny_scale = st.sampled_from([2.0**-20, f32(2.0**-20 * 1.1)])
    tiny_a_scale = st.sampled_from([2.0**-27, f32(2.0**-27 * 1.3)])
    tiny_table = st.sampled_from([0.0, 2.0**-30, -f32(2.0**-30 * 1.7), 1.0])
    units = st.sampled_from([0, 1, -1, 2, 127])
    d = data.draw(st.sampled_from([4, 12]))
    y, w = data.draw(exactly(units, 3 * d)), data.draw(exactly(tiny_scale, 3 * d))
    scale = data.draw(tiny_a_scale)
    q, q_scale, k, k_scale, v = oracle.qkv(
        y, scale, w, data.draw(exactly(tiny_table, 3 * d)), data.draw(exactly(tiny_table, d // 2)),
        data.draw(exactly(tiny_table, d // 2)), data.draw(exactly(tiny_scale, 1)), 1, 1, d,
        [data.draw(exactly(tiny_table, d))], data.draw(exactly(tiny_table, d)), data.draw(exactly(tiny_table, d)), 2.0**-60,
    )  # fmt: skip
    o, row_sum, _ = oracle.attention_row(q[0], q_scale[0], oracle.Head(k * 2, [k_scale[0], 2.0**-27], v * 2), 2)
    oracle.attention_output([o], [row_sum], [2.0**-20])
    oracle.mlp(y[: 2 * d], scale, w[: 2 * d])
    gates = data.draw(exactly(st.integers(-(2**31) + 1, 2**31 - 1), d))
    outcome(oracle.mlp, [*gates, *y[:d]], data.draw(a_scales), [*data.draw(exactly(scales, d)), *w[:d]])
    x = [
        oracle.fl(a + b)
        for a, b in zip(oracle.dequantise(y, w, scale), data.draw(exactly(tiny_table, 3 * d)), strict=True)
    ]
    oracle.norm_quantise(x, 2.0**-60)
