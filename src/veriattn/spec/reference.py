"""NumPy reference of every operation of the canonical function (docs/spec.md sections 3 to 8).

Elementwise work is IEEE binary32, one rounding per operation, nothing fused: NumPy evaluates each ufunc into
memory, so the code below *is* the order of operations. Integers are exact. Faster implementations (native, Triton)
must return the same bits; `tests/` holds them to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.errors import NumericsError
from veriattn.spec.constants import (
    ABSMAX_FLOOR,
    ABSMAX_LIMIT,
    EXP2_COEFFICIENTS,
    EXP2_LIMIT,
    LOG2E,
    LUT15,
    SIGMOID_LIMIT,
    XI_MAX,
    largest_power_of_two_divisor,
    query_scale_constant,
)

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_127 = np.float32(127.0)
_32767 = np.float32(32767.0)
_ONE = np.float32(1.0)


# --- linear -----------------------------------------------------------------------------------------------------


def gemm_i8(a_i8: I8, w_i8: I8) -> I32:
    """Exact a @ w.T. Shapes: a (tokens, in), w (out, in) -> (tokens, out). Bounds: in <= 131071, so |y| < 2**31.

    A binary64 product of int8 values is exact in any order of summation: every partial sum is below 2**53.
    """
    return (a_i8.astype(np.float64) @ w_i8.astype(np.float64).T).astype(np.int32)


def pack(w_i8: I8) -> npt.NDArray[np.float64]:
    """Weights in the form that `gemm_packed` reads; opaque to callers."""
    return w_i8.astype(np.float64)


def gemm_packed(packed: npt.NDArray[np.float64], a_i8: I8) -> I32:
    """`gemm_i8` with weights from `pack`. Shapes: (tokens, in) -> (tokens, out)."""
    return (a_i8.astype(np.float64) @ packed.T).astype(np.int32)


def dequantise(y_i32: I32, w_scale: F32, a_scale: F32, bias: F32 | None) -> F32:
    """v = float(y) * w_scale[out] * a_scale[token] (+ bias[out]). Shapes: y (tokens, out) -> (tokens, out)."""
    v = y_i32.astype(np.float32)
    v *= w_scale[None, :]
    v *= a_scale[:, None]
    if bias is not None:
        v += bias[None, :]
    return v


# --- quantisation -------------------------------------------------------------------------------------------------


def absmax(x: F32) -> F32:
    """Floored absolute maximum over the last axis.

    Raises: NumericsError where an element is NaN or its size is 2**40 or more; the canonical function ends there.
    """
    # max propagates NaN, and NaN fails the comparison below.
    m = np.max(np.abs(x), axis=-1)
    if not bool(np.all(m < ABSMAX_LIMIT)):
        raise NumericsError(
            "an activation is not finite or is 2**40 or larger",
            hint="the model does not fit the canonical numerics; convert it again and look at its quality report",
        )
    floored: F32 = np.maximum(m, ABSMAX_FLOOR)
    return floored


def _round_i8(x: F32) -> I8:
    return np.clip(np.rint(x), -_127, _127).astype(np.int8)


def quantise(x: F32) -> tuple[I8, F32]:
    """Per-row int8: a = rint(x * (127 / absmax)), scale = absmax / 127. Shapes: (..., n) -> (..., n), (...)."""
    m = absmax(x)
    return _round_i8(x * (_127 / m)[..., None]), m / _127


def rms_integer(x: F32, eps: np.float32) -> tuple[npt.NDArray[np.int16], F32, F32, F32]:
    """The parts of a root-mean-square norm whose only reduction is an integer sum.

    Returns b (int16 image of x), absmax, step = absmax / 32767 and rstd = 1 / sqrt(mean(b**2) * step**2 + eps).
    """
    m = absmax(x)
    b = np.clip(np.rint(x * (_32767 / m)[..., None]), -_32767, _32767).astype(np.int16)
    sum_squares = np.sum(b.astype(np.int64) ** 2, axis=-1)
    step = m / _32767
    mean = sum_squares.astype(np.float32) / np.float32(x.shape[-1])
    rstd = _ONE / np.sqrt(mean * (step * step) + eps)
    return b, m, step, rstd


def norm_quantise(x: F32, eps: np.float32) -> tuple[I8, F32]:
    """RMS norm (its weight is folded into the next linear) and int8. Shapes: (tokens, n) -> (tokens, n), (tokens,)."""
    _, m, _, rstd = rms_integer(x, eps)
    return _round_i8(x * (_127 / m)[..., None]), (m / _127) * rstd


# --- rotary embedding, Hadamard, q/k/v ----------------------------------------------------------------------------


def hadamard(x: F32, block: int) -> F32:
    """Unnormalised Walsh-Hadamard transform of each `block` of the last axis, butterflies of stride 1, 2, 4, ..."""
    y = x.reshape(-1, block)
    h = 1
    while h < block:
        pairs = y.reshape(-1, block // (2 * h), 2, h)
        low, high = pairs[:, :, 0, :], pairs[:, :, 1, :]
        y = np.stack((low + high, low - high), axis=2).reshape(-1, block)
        h *= 2
    return y.reshape(x.shape)


def rotary(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate pairs (i, i + r/2) of the first r dimensions. Shapes: x (tokens, heads, d); cos, sin (tokens, r/2)."""
    half = cos.shape[-1]
    c, s = cos[:, None, :], sin[:, None, :]
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    out = x.copy()
    out[..., :half] = x1 * c - x2 * s
    out[..., half : 2 * half] = x2 * c + x1 * s
    return out


def head_norm(x: F32, weight: F32, eps: np.float32) -> F32:
    """Per-head RMS norm with weight, from the 16-bit image of x. Shapes: x (tokens, heads, d), weight (d,)."""
    b, _, step, rstd = rms_integer(x, eps)
    return (b.astype(np.float32) * (step * rstd)[..., None]) * weight


def qkv_epilogue(
    y_i32: I32,
    a_scale: F32,
    w_scale: F32,
    bias: F32 | None,
    cos: F32,
    sin: F32,
    v_scale: F32,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    k_center: F32 | None = None,
    q_norm: F32 | None = None,
    k_norm: F32 | None = None,
    eps: np.float32 = _ONE,
) -> tuple[I8, F32, I8, F32, I8]:
    """Fused qkv claim to int8 attention operands.

    Shapes: y (tokens, (heads + 2 * kv_heads) * d); cos, sin (tokens, r/2), already gathered by position;
    v_scale (kv_heads,); k_center (kv_heads, d). Returns q (tokens, heads, d), q_scale (tokens, heads),
    k (tokens, kv_heads, d), k_scale (tokens, kv_heads), v (tokens, kv_heads, d).
    """
    tokens = y_i32.shape[0]
    x = dequantise(y_i32, w_scale, a_scale, bias).reshape(tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = x[:, :num_heads], x[:, num_heads : num_heads + num_kv_heads], x[:, num_heads + num_kv_heads :]
    # The checked domain keeps what follows finite; q_norm and k_norm check it themselves.
    absmax(x)
    if q_norm is not None and k_norm is not None:
        q, k = head_norm(q, q_norm, eps), head_norm(k, k_norm, eps)
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    if k_center is not None:
        k = k - k_center[None]
    block = largest_power_of_two_divisor(head_dim)
    q_i8, q_step = quantise(hadamard(q, block))
    k_i8, k_scale = quantise(hadamard(k, block))
    v_i8 = _round_i8(np.clip(v * (_ONE / v_scale)[None, :, None], -_127, _127))
    return q_i8, q_step * query_scale_constant(head_dim), k_i8, k_scale, v_i8


# --- attention ----------------------------------------------------------------------------------------------------


def attention_weights(scores_i32: I32, q_scale: F32, k_scale: F32, visible: npt.NDArray[np.bool_]) -> tuple[I32, I32]:
    """14-bit attention weights and their row sums from exact scores.

    Shapes: scores (rows, keys), q_scale (rows,), k_scale (keys,), visible (rows, keys) with at least one true per row.
    Returns P (rows, keys) int32 in [0, 16336] and L (rows,) int32 >= 16336. Hidden keys get P = 0 by predicate.
    """
    t = scores_i32.astype(np.float32) * k_scale[None, :]
    m = np.max(t, axis=1, where=visible, initial=np.float32(-np.inf))
    p = _weights(t, m, q_scale)
    p[~visible] = 0
    return p, p.sum(axis=1, dtype=np.int32)


def weights_below(scores_i32: I32, q_scale: F32, k_scale: F32, row_max: F32) -> I32:
    """P of visible keys relative to a given maximum. Shapes: (rows, keys), (rows,), (keys,), (rows,) -> (rows, keys)."""
    return _weights(scores_i32.astype(np.float32) * k_scale[None, :], row_max, q_scale)


def _weights(t: F32, m: F32, q_scale: F32) -> I32:
    # Keys that are not visible may lie above the maximum; they are clamped here and dropped by the caller.
    y = np.clip((m[:, None] - t) * q_scale[:, None], np.float32(0), XI_MAX)
    xi = np.rint(y).astype(np.int32)
    p: I32 = ((LUT15[xi & 63] >> (xi >> 6)) + 1) >> 1
    return p


def causal_mask(num_queries: int, start: int, num_keys: int) -> npt.NDArray[np.bool_]:
    """Query i, at position start + i, sees keys 0 .. start + i."""
    return np.arange(num_keys)[None, :] <= (start + np.arange(num_queries))[:, None]


def attention_contiguous(q_i8: I8, q_scale: F32, k_i8: I8, k_scale: F32, v_i8: I8, start: int) -> tuple[I64, I32]:
    """Causal attention of one sequence, grouped heads, keys in one piece.

    Shapes: q (tokens, heads, d), q_scale (tokens, heads), k and v (keys, kv_heads, d), k_scale (keys, kv_heads) with
    keys = start + tokens. Returns O (tokens, heads, d) int64, |O| < 2**38, and L (tokens, heads) int32.
    """
    tokens, heads, d = q_i8.shape
    keys, kv_heads, _ = k_i8.shape
    group = heads // kv_heads
    visible = causal_mask(tokens, start, keys)
    out = np.empty((tokens, heads, d), np.int64)
    row_sum = np.empty((tokens, heads), np.int32)
    for head in range(heads):
        kv = head // group
        scores = gemm_i8(q_i8[:, head], k_i8[:, kv])
        p, row_sum[:, head] = attention_weights(scores, q_scale[:, head], k_scale[:, kv], visible)
        # Exact: |sum P*V| <= 16336 * 127 * 131072 < 2**38 < 2**53.
        out[:, head] = (p.astype(np.float64) @ v_i8[:, kv].astype(np.float64)).astype(np.int64)
    return out, row_sum


def gather_pages(pages: npt.NDArray[Any], block_table: I32, keys: int) -> npt.NDArray[Any]:
    """Contiguous (keys, kv_heads, ...) copy of a sequence's pages (pages, kv_heads, page, ...)."""
    picked = pages[block_table].swapaxes(1, 2)
    return picked.reshape(-1, *picked.shape[2:])[:keys]


def attention(
    q_i8: I8, q_scale: F32, k_pages: I8, k_scale_pages: F32, v_pages: I8, block_table: I32, start: int
) -> tuple[I64, I32]:
    """`attention_contiguous` over a paged cache (spec/kv.py) that already holds this run's keys and values.

    Shapes: q (tokens, heads, d), q_scale (tokens, heads), k_pages and v_pages (pages, kv_heads, page, d), k_scale_pages
    (pages, kv_heads, page), block_table (pages of the sequence in order,). Returns O (tokens, heads, d), L (tokens, heads).
    """
    keys = start + q_i8.shape[0]
    return attention_contiguous(
        q_i8,
        q_scale,
        gather_pages(k_pages, block_table, keys),
        gather_pages(k_scale_pages, block_table, keys),
        gather_pages(v_pages, block_table, keys),
        start,
    )


def attention_scores(q_i8: I8, k_pages: I8, block_table: I32, keys: int, kv_heads: range) -> I32:
    """Exact q.k of queries with the first `keys` keys of a sequence, visible or not. kv_heads: those that the heads of q
    belong to, neighbours. Shapes: q (tokens, heads, d), k_pages (pages, kv_heads, page, d) -> (heads, tokens, keys)."""
    k = gather_pages(k_pages, block_table, keys)
    group = q_i8.shape[1] // len(kv_heads)
    return np.stack([gemm_i8(q_i8[:, h], k[:, kv_heads[h // group]]) for h in range(q_i8.shape[1])])


def attention_weights_paged(
    scores_i32: I32, q_scale: F32, k_scale_pages: F32, block_table: I32, start: int
) -> npt.NDArray[np.uint16]:
    """P of one run from its scores, all heads. Shapes: scores (heads, tokens, keys), q_scale (tokens, heads) -> (heads,
    tokens, keys) uint16, 0 where a key is not visible."""
    heads, tokens, keys = scores_i32.shape
    k_scale = gather_pages(k_scale_pages, block_table, keys)
    group = heads // k_scale.shape[1]
    visible = causal_mask(tokens, start, keys)
    out = np.empty(scores_i32.shape, np.uint16)
    for h in range(heads):
        out[h] = attention_weights(scores_i32[h], q_scale[:, h], k_scale[:, h // group], visible)[0]
    return out


def weighted_values(p_u16: npt.NDArray[np.uint16], v_pages: I8, block_table: I32) -> I64:
    """O = P V of one run. Shapes: P (heads, tokens, keys), v_pages (pages, kv_heads, page, d) -> (tokens, heads, d) int64."""
    heads, _, keys = p_u16.shape
    v = gather_pages(v_pages, block_table, keys).astype(np.float64)
    group = heads // v.shape[1]
    return np.stack([p_u16[h].astype(np.float64) @ v[:, h // group] for h in range(heads)], axis=1).astype(np.int64)


def attention_epilogue(o_i64: I64, l_i32: I32, v_scale: F32) -> tuple[I8, F32]:
    """o = float(O) / float(L) * v_scale, then int8 per token.

    Shapes: O (tokens, heads, d), L (tokens, heads), v_scale (kv_heads,) -> (tokens, heads * d), (tokens,).
    """
    tokens, heads, d = o_i64.shape
    scale = np.repeat(v_scale, heads // v_scale.shape[0])
    o = (o_i64.astype(np.float32) / l_i32.astype(np.float32)[:, :, None]) * scale[None, :, None]
    return quantise(o.reshape(tokens, heads * d))


# --- MLP, residual, logits -----------------------------------------------------------------------------------------


def exp2(z: F32) -> F32:
    """2**z for z clamped to [-125, 125]: round to an integer power, degree-6 polynomial by Horner's rule."""
    z = np.clip(z, -EXP2_LIMIT, EXP2_LIMIT)
    n = np.rint(z)
    f = z - n
    p = np.full_like(f, EXP2_COEFFICIENTS[-1])
    for c in EXP2_COEFFICIENTS[-2::-1]:
        p = p * f + c
    power = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return p * power


def silu(g: F32) -> F32:
    """g / (1 + 2**(-g * log2 e)), the exponent clamped to [-48, 48]."""
    z = np.clip(g * -LOG2E, -SIGMOID_LIMIT, SIGMOID_LIMIT)
    return g / (_ONE + exp2(z))


def mlp_epilogue(y_i32: I32, a_scale: F32, w_scale: F32) -> tuple[I8, F32]:
    """Fused gate_up claim to the int8 input of down: silu(gate) * up, block Hadamard, int8 per token.

    Shapes: y (tokens, 2 * n), the gate's columns first -> (tokens, n), (tokens,).
    """
    v = dequantise(y_i32, w_scale, a_scale, None)
    n = v.shape[1] // 2
    h = silu(v[:, :n]) * v[:, n:]
    absmax(h)
    return quantise(hadamard(h, largest_power_of_two_divisor(n)))


def residual_add(x: F32, y_i32: I32, a_scale: F32, w_scale: F32, bias: F32 | None = None) -> F32:
    """x + dequantised claim. Shapes: x, y (tokens, hidden)."""
    return x + dequantise(y_i32, w_scale, a_scale, bias)


def logits(y_i32: I32, a_scale: F32, w_scale: F32) -> F32:
    """Dequantised lm_head claim. Shapes: y (rows, vocab) -> (rows, vocab)."""
    return dequantise(y_i32, w_scale, a_scale, None)
