"""Exact reference of the field arithmetic behind the checks: p = 2**50 - 27, two repetitions, Python integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from veriattn.spec.reference import F32, I8, I32, I64, attention_weights, gather_pages

#: The prime of every challenge. All claims are smaller in size, so no error is a multiple of it.
P = 2**50 - 27

#: Attention outputs lie below this in size (16336 * 127 * 131072 < 2**38); larger claims are wrong by type.
OUTPUT_LIMIT = 2**39

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.integer]


def _dot(x: Integers, y: Integers) -> U64:
    """x @ y mod p with Python integers, so that nothing can overflow; negative numbers map to p - |x|."""
    product = np.atleast_2d(x).astype(object) @ np.atleast_2d(y).astype(object)
    return np.array(product % P, dtype=np.uint64).reshape(product.shape)


def linear_check(y_i32: I32, r_u64: U64, a_i8: I8, u_u64: U64) -> U8:
    """1 for each row of a claimed product with sum_n y*r == sum_k a*u (mod p) in both repetitions.

    Shapes: y (tokens, out), r (2, out), a (tokens, in), u (2, in) with u = W^T r -> (tokens,).
    Soundness: a wrong row passes with probability p**-2 over r, uniform and unknown to whoever made y.
    """
    equal: U8 = np.all(_dot(y_i32, r_u64.T) == _dot(a_i8, u_u64.T), axis=1).astype(np.uint8)
    return equal


def project_weights(w_i8: I8, r_u64: U64, u_u64: U64) -> None:
    """u += r @ w mod p, in place. Shapes: w (rows, in), r (repetitions, rows), u (repetitions, in)."""
    u_u64[...] = (u_u64 + _dot(r_u64, w_i8)) % np.uint64(P)


def value_projection(v_i8: I8, w_u64: U64) -> U64:
    """g = v.w mod p. Shapes: v (tokens, kv_heads, d), w (kv_heads, 2, d) -> (tokens, kv_heads, 2)."""
    return np.stack([_dot(v_i8[:, h], w_u64[h].T) for h in range(v_i8.shape[1])], axis=1)


def project_outputs(o_i64: I64, w_u64: U64) -> tuple[U64, bool]:
    """O.w mod p per token and head, and whether every |O| < OUTPUT_LIMIT.

    Shapes: O (tokens, heads, d), w (kv_heads, 2, d) -> (tokens, heads, 2).
    """
    group = o_i64.shape[1] // w_u64.shape[0]
    out = np.stack([_dot(o_i64[:, h], w_u64[h // group].T) for h in range(o_i64.shape[1])], axis=1)
    return out, bool(np.all((o_i64 < OUTPUT_LIMIT) & (o_i64 > -OUTPUT_LIMIT)))


def key_projection(k_i8: I8, r_u64: U64, start: int, c_u64: U64) -> None:
    """c += sum_t r[start + t] * k[t] mod p, in place.

    Shapes: k (tokens, kv_heads, d), r (2, positions), c (kv_heads, 2, d).
    """
    r = r_u64[:, start : start + k_i8.shape[0]]
    for h in range(k_i8.shape[1]):
        project_weights(k_i8[:, h], r, c_u64[h])


def attention_replay(
    q_i8: I8, q_scale: F32, k_pages: I8, k_scale_pages: F32, g_pages: U64, block_table: I32, start: int
) -> tuple[I32, U64]:
    """Row sums L and P.g mod p of causal attention, recomputed from q, k and g_j = v_j.w.

    Shapes: q (tokens, heads, d), q_scale (tokens, heads), pages as in spec.kv, g (pages, kv_heads, 256, 2)
    -> L (tokens, heads), (tokens, heads, 2). An honest O has O.w == P.g.
    """
    tokens, heads, _ = q_i8.shape
    keys = start + tokens
    k = gather_pages(k_pages, block_table, keys)
    scores = np.stack(
        [
            (q_i8[:, h].astype(np.int64) @ k[:, h // (heads // k.shape[1])].astype(np.int64).T).astype(np.int32)
            for h in range(heads)
        ]
    )
    return _from_scores(scores, q_scale, k_scale_pages, g_pages, block_table, start)


def _from_scores(
    scores: I32, q_scale: F32, k_scale_pages: F32, g_pages: U64, block_table: I32, start: int
) -> tuple[I32, U64]:
    heads, tokens, keys = scores.shape
    k_scale, g = gather_pages(k_scale_pages, block_table, keys), gather_pages(g_pages, block_table, keys)
    group = heads // k_scale.shape[1]
    visible = np.arange(keys)[None, :] <= (start + np.arange(tokens))[:, None]
    row_sum, pg = np.empty((tokens, heads), np.int32), np.empty((tokens, heads, 2), np.uint64)
    for h in range(heads):
        p, row_sum[:, h] = attention_weights(scores[h], q_scale[:, h], k_scale[:, h // group], visible)
        pg[:, h] = _dot(p, g[:, h // group])
    return row_sum, pg


def attention_transfer(
    scores_i32: I32,
    q_i8: I8,
    q_scale: F32,
    k_i8: I8,
    c_u64: U64,
    r_u64: U64,
    k_scale_pages: F32,
    g_pages: U64,
    block_table: I32,
    start: int,
) -> tuple[U8, I32, U64]:
    """Check claimed scores against the challenge sums of the keys, then L and P.g from the scores.

    Shapes: scores (heads, tokens, start + tokens), of which row i's first start + i + 1 are read; q (tokens, heads, d);
    k (tokens, kv_heads, d), the chunk's own keys; c (kv_heads, 2, d) = sum of r_j k_j over keys before `start`;
    r (2, >= start + tokens). Returns ok (tokens, heads), L and P.g as `attention_replay`.
    ok is 1 iff sum_j r_j s_ij == q_i . sum_j r_j k_j (mod p) over the visible keys, in both repetitions.
    """
    heads, tokens, keys = scores_i32.shape
    group = heads // k_i8.shape[1]
    ok = np.empty((tokens, heads), np.uint8)
    c = c_u64.copy()
    visible = np.where(
        np.arange(keys)[None, None, :] <= (start + np.arange(tokens))[None, :, None], scores_i32, np.int32(0)
    )
    for i in range(tokens):
        key_projection(k_i8[i : i + 1], r_u64, start + i, c)
        for h in range(heads):
            ok[i, h] = linear_check(visible[h, i : i + 1], r_u64[:, :keys], q_i8[i, h][None], c[h // group])[0]
    return ok, *_from_scores(visible, q_scale, k_scale_pages, g_pages, block_table, start)
