"""Attention over a share of the keys: what lets prover and verifier split one row and still get the same bits.

Attention weights are relative to the row maximum over *all* keys (docs/spec.md section 6). So a row is split in three
steps: each share's scores and their maximum; the maximum of the maxima; each share's P, L and O relative to that. L and O of
the shares add up as integers. A share without keys has maximum -inf, which only ever enters `max`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from veriattn.spec.field import U64
from veriattn.spec.field import P as PRIME
from veriattn.spec.reference import F32, I8, I32, I64, causal_mask, gather_pages, gemm_i8, weights_below

U16 = npt.NDArray[np.uint16]


def share_scores(q_i8: I8, k_i8: I8) -> I32:
    """q.k for every row and key. Shapes: q (rows, heads, d), k (keys, kv_heads, d) -> (heads, rows, keys)."""
    group = q_i8.shape[1] // k_i8.shape[1]
    return np.stack([gemm_i8(q_i8[:, h], k_i8[:, h // group]) for h in range(q_i8.shape[1])])


def share_maximum(scores_i32: I32, k_scale: F32) -> F32:
    """Largest t of every row over a share that all rows see. Shapes: (heads, rows, keys), (keys, kv_heads) -> (rows, heads)."""
    heads, rows, keys = scores_i32.shape
    if keys == 0:
        return np.full((rows, heads), -np.inf, np.float32)
    group = heads // k_scale.shape[1]
    scale = np.repeat(k_scale.T, group, axis=0)[:, None, :]
    return np.ascontiguousarray(np.max(scores_i32.astype(np.float32) * scale, axis=2).T)


def share_weights(scores_i32: I32, q_scale: F32, k_scale: F32, row_max: F32) -> U16:
    """P of a share that all rows see, relative to `row_max`, which is at least the share's own maximum.

    Shapes: scores (heads, rows, keys), q_scale and row_max (rows, heads), k_scale (keys, kv_heads) -> (heads, rows, keys).
    """
    heads = scores_i32.shape[0]
    group = heads // k_scale.shape[1]
    out = np.empty(scores_i32.shape, np.uint16)
    for h in range(heads):
        out[h] = weights_below(scores_i32[h], q_scale[:, h], k_scale[:, h // group], row_max[:, h])
    return out


def share_sums(p_u16: U16) -> I32:
    """L of a share. Shapes: (heads, rows, keys) -> (rows, heads)."""
    return np.ascontiguousarray(p_u16.sum(axis=2, dtype=np.int32).T)


def share_outputs(p_u16: U16, v_i8: I8) -> I64:
    """O of a share. Shapes: P (heads, rows, keys), v (keys, kv_heads, d) -> (rows, heads, d) int64; sums of shares add up."""
    heads = p_u16.shape[0]
    group = heads // v_i8.shape[1]
    v = v_i8.astype(np.float64)
    return np.stack([p_u16[h].astype(np.float64) @ v[:, h // group] for h in range(heads)], axis=1).astype(np.int64)


def share_projection(p_u16: U16, g_u64: U64) -> U64:
    """P.g mod p of a share. Shapes: P (heads, rows, keys), g (keys, kv_heads, 2) -> (rows, heads, 2).

    In three digits of 17 bits: every partial sum is below 2**14 * 2**17 * 2**17 < 2**53, exact in binary64.
    """
    heads, rows, _ = p_u16.shape
    group = heads // g_u64.shape[1]
    total = np.zeros((rows, heads, 2), np.uint64)
    p_f64 = p_u16.astype(np.float64)
    for digit in range(3):
        part = ((g_u64 >> np.uint64(17 * digit)) & np.uint64(0x1FFFF)).astype(np.float64)
        sums = np.stack([p_f64[h] @ part[:, h // group] for h in range(heads)], axis=1).astype(np.uint64)
        # 2**(17 * digit) * sums may pass 64 bits: multiply in two steps, reducing in between.
        for _ in range(digit):
            sums = ((sums % np.uint64(PRIME)) << np.uint64(13)) % np.uint64(PRIME)
            sums = (sums << np.uint64(4)) % np.uint64(PRIME)
        total = (total + sums) % np.uint64(PRIME)
    return total


def tail_maximum(q_i8: I8, k_pages: I8, k_scale_pages: F32, block_table: I32, start: int) -> F32:
    """Row maxima of causal attention over a paged share: row i sees its first start + i + 1 keys.

    Shapes: q (rows, heads, d) -> (rows, heads).
    """
    rows, heads, _ = q_i8.shape
    keys = start + rows
    k, k_scale = gather_pages(k_pages, block_table, keys), gather_pages(k_scale_pages, block_table, keys)
    group, visible = heads // k.shape[1], causal_mask(rows, start, keys)
    out = np.empty((rows, heads), np.float32)
    for h in range(heads):
        t = gemm_i8(q_i8[:, h], k[:, h // group]).astype(np.float32) * k_scale[None, :, h // group]
        out[:, h] = np.max(t, axis=1, where=visible, initial=np.float32(-np.inf))
    return out


def tail_attention(
    q_i8: I8, q_scale: F32, k_pages: I8, k_scale_pages: F32, v_pages: I8, block_table: I32, start: int, row_max: F32
) -> tuple[I64, I32]:
    """Causal attention over a paged share relative to `row_max`, which is at least the share's own maximum.

    Shapes: q (rows, heads, d), q_scale and row_max (rows, heads) -> O (rows, heads, d), L (rows, heads).
    """
    rows, heads, d = q_i8.shape
    keys = start + rows
    k, k_scale = gather_pages(k_pages, block_table, keys), gather_pages(k_scale_pages, block_table, keys)
    v = gather_pages(v_pages, block_table, keys).astype(np.float64)
    group, visible = heads // k.shape[1], causal_mask(rows, start, keys)
    out, row_sum = np.empty((rows, heads, d), np.int64), np.empty((rows, heads), np.int32)
    for h in range(heads):
        scores = gemm_i8(q_i8[:, h], k[:, h // group])
        p = weights_below(scores, q_scale[:, h], k_scale[:, h // group], row_max[:, h])
        p[~visible] = 0
        row_sum[:, h] = p.sum(axis=1, dtype=np.int32)
        out[:, h] = (p.astype(np.float64) @ v[:, h // group]).astype(np.int64)
    return out, row_sum
