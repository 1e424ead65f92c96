"""Kernels for shares of attention, with the bits of the functions of `veriattn.spec.partial`; keys may lie in pages.

Where a block table is given, per-key arrays are pages (spec/kv.py) and the share is the table's first `keys` keys; without
one they are (kv_heads, keys, ...) in one piece. Functions that end in `_into` add a share to what earlier ones left, at
columns `at`, `at + 1`, ... of arrays (heads, rows, columns). Argument rules as in `veriattn.native.kernels`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from veriattn.native import _native
from veriattn.native.kernels import _checked
from veriattn.spec.field import U64
from veriattn.spec.reference import F32, I8, I32, I64

U16 = npt.NDArray[np.uint16]


@_checked
def tail_maximum(q_i8: I8, k_pages: I8, k_scale_pages: F32, block_table: I32, start: int) -> F32:
    """See `spec.partial.tail_maximum`."""
    out = np.empty(q_i8.shape[:2], np.float32)
    # Scales of queries have no part in a maximum over keys; they only have to be there.
    _native.attention(q_i8, out, k_pages, k_scale_pages, None, None, block_table, start, None, None, None, None, out)
    return out


@_checked
def tail_attention(
    q_i8: I8, q_scale: F32, k_pages: I8, k_scale_pages: F32, v_pages: I8, block_table: I32, start: int, row_max: F32
) -> tuple[I64, I32]:
    """See `spec.partial.tail_attention`."""
    o, row_sum = np.empty(q_i8.shape, np.int64), np.empty(q_i8.shape[:2], np.int32)
    _native.attention(
        q_i8, q_scale, k_pages, k_scale_pages, v_pages, None, block_table, start, o, row_sum, None, row_max, None
    )
    return o, row_sum


@_checked
def share_scores_into(scores_i32: I32, at: int, keys: int, q_i8: I8, k_i8: I8, block_table: I32 | None = None) -> None:
    """Write q.k of a share. Shapes: scores (heads, rows, columns), q (rows, heads, d)."""
    _native.share_scores(q_i8, k_i8, block_table, keys, scores_i32, at, 0, k_i8.shape[0 if block_table is None else 1])


@_checked
def share_maximum_into(
    row_max: F32, scores_i32: I32, at: int, keys: int, k_scale: F32, block_table: I32 | None = None
) -> None:
    """Raise row maxima (rows, heads) to those of a share."""
    _native.share_maximum(scores_i32, at, keys, k_scale, block_table, row_max)


@_checked
def share_weights_into(
    p_u16: U16 | None,
    row_sum: I32,
    pg: U64 | None,
    scores_i32: I32,
    at: int,
    keys: int,
    q_scale: F32,
    k_scale: F32,
    row_max: F32,
    g_u64: U64 | None = None,
    block_table: I32 | None = None,
) -> None:
    """P of a share relative to `row_max`: written to p (heads, rows, columns), its sums added to row_sum (rows, heads) and,
    with g, P.g mod p to pg (rows, heads, 2). Scores and P stay in the cache of a core between these."""
    _native.share_weights(scores_i32, at, keys, q_scale, k_scale, g_u64, block_table, row_max, p_u16, row_sum, pg)


@_checked
def share_projection_into(pg: U64, p_u16: U16, at: int, keys: int, g_u64: U64, block_table: I32 | None = None) -> None:
    """Add P.g mod p of a share to pg (rows, heads, 2)."""
    _native.share_projection(p_u16, at, keys, g_u64, block_table, pg)


@_checked
def share_outputs_into(o_i64: I64, p_u16: U16, at: int, keys: int, v_i8: I8, block_table: I32 | None = None) -> None:
    """Add P V of a share to o (rows, heads, d). Bounds: P <= 16384."""
    _native.share_outputs(p_u16, at, keys, v_i8, block_table, o_i64)
