"""Attention: in one kernel for prefill; for decode, the transfer check and shares of the keys in two, with scores in
memory between.

The rows of one KV head are its queries times its group of heads, so that a tile of keys is read once for all of
them. Work is listed
run by run (`Plan`), so that runs of any lengths share a launch. All sums are integers and every maximum is one of bit patterns:
the result does not depend on tiles, splits or the order of atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

import torch
from veriattn.prover.cuda import numerics as nm
from veriattn.prover.cuda.cache import KvPages
from veriattn.prover.cuda.launch import ceil_div, interpreted, launch, next_power_of_two


@dataclass(frozen=True)
class RunPlace:
    """A run of queries: rows `row` .. `row + rows` of the step, at positions from `start`, over the first `keys`
    keys of `table`.

    scores_at: offset of its scores (heads, rows, keys) among all scores of the step.
    """

    row: int
    rows: int
    start: int
    keys: int
    table: Sequence[int]
    scores_at: int = 0


@dataclass(frozen=True)
class Plan:
    """Runs and row tiles as arrays for the kernels.

    runs_i64 (runs, 6): first row, rows, start, first page in the tables, keys, offset of its scores.
    tiles_i32 (tiles, 2): run, first row in units of a row and head.
    """

    runs_i64: npt.NDArray[np.int64]
    tables_i32: npt.NDArray[np.int32]
    tiles_i32: npt.NDArray[np.int32]
    block_m: int
    max_keys: int

    @classmethod
    def make(cls, places: Sequence[RunPlace], group: int, block_m: int) -> Plan:
        """Tiles of long runs come last row first: those take longest, and what starts early ends early."""
        runs: list[tuple[int, ...]] = []
        tables: list[int] = []
        tiles: list[tuple[int, int]] = []
        for i, p in enumerate(places):
            runs.append((p.row, p.rows, p.start, len(tables), p.keys, p.scores_at))
            tables.extend(p.table)
            tiles.extend((i, first) for first in range(0, p.rows * group, block_m))
        return cls(
            np.array(runs, np.int64),
            np.array(tables or [0], np.int32),
            np.array(tiles[::-1], np.int32).reshape(-1, 2),
            block_m,
            max((p.keys for p in places), default=0),
        )


@dataclass(frozen=True)
class DevicePlan:
    """A plan's arrays on the device."""

    runs: torch.Tensor
    tables: torch.Tensor
    tiles: torch.Tensor
    block_m: int
    max_keys: int


def block_rows(rows: int, group: int) -> int:
    """Rows (times heads of a group) of one tile for runs of at most `rows` rows."""
    if interpreted():
        return next_power_of_two(max(16, min(256, rows * group)))
    return min(64, next_power_of_two(max(16, rows * group)))


@triton.jit
def _run(runs_ptr, tiles_ptr):
    tile = tl.program_id(0)
    run_ptr = runs_ptr + tl.load(tiles_ptr + 2 * tile) * 6
    first = tl.load(tiles_ptr + 2 * tile + 1)
    start, table = tl.load(run_ptr + 2).to(tl.int32), tl.load(run_ptr + 3)
    keys, scores_at = tl.load(run_ptr + 4).to(tl.int32), tl.load(run_ptr + 5)
    return tl.load(run_ptr), tl.load(run_ptr + 1).to(tl.int32), first, start, table, keys, scores_at


@triton.jit
def _key_tile(k_ptr, page, kv_heads, kv, place, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Keys as (D_PAD, keys)."""
    i = tl.arange(0, D_PAD)[:, None]
    # One wide number for the page, narrow ones inside of it.
    base = k_ptr + (page.to(tl.int64) * kv_heads + kv) * (PAGE * D)
    at = place[None, :] * D + i
    if D == D_PAD:
        return tl.load(base + at)
    return tl.load(base + at, mask=i < D, other=0)


@triton.jit
def _value_tile(v_ptr, page, kv_heads, kv, place, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Values as (keys, D_PAD), contiguous along the keys."""
    i = tl.arange(0, D_PAD)[None, :]
    base = v_ptr + (page.to(tl.int64) * kv_heads + kv) * (PAGE * D)
    at = i * PAGE + place[:, None]
    if D == D_PAD:
        return tl.load(base + at)
    return tl.load(base + at, mask=i < D, other=0)


@triton.jit
def prefill_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    runs_ptr,
    tables_ptr,
    tiles_ptr,
    o_ptr,
    l_ptr,
    lut_ptr,
    heads,
    kv_heads,
    first_kv,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TABLE: tl.constexpr,
):
    """O and L of BLOCK_M rows of one KV head: first pass row maxima, second pass weights and their products with the values."""
    row, rows, first, start, table, _, _ = _run(runs_ptr, tiles_ptr)
    kv = first_kv + tl.program_id(1)
    packed = first + tl.arange(0, BLOCK_M)
    token = packed // GROUP
    valid = token < rows
    at_head = (row + token) * heads + tl.program_id(1) * GROUP + packed % GROUP
    i = tl.arange(0, D_PAD)
    q = tl.load(q_ptr + at_head[:, None] * D + i[None, :], mask=valid[:, None] & (i < D)[None, :], other=0)
    q_scale = tl.load(q_scale_ptr + at_head, mask=valid, other=0.0)[:, None]
    last = (start + token)[:, None]
    keys = start + tl.minimum((first + BLOCK_M - 1) // GROUP, rows - 1) + 1
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for key in range(0, keys, BLOCK_N):
        page = tl.load(tables_ptr + table + key // PAGE)
        place = tl.multiple_of(key % PAGE, BLOCK_N) + tl.arange(0, BLOCK_N)
        k_scale = tl.load(k_scale_ptr + (page.to(tl.int64) * kv_heads + kv) * PAGE + place)
        s = tl.dot(q, _key_tile(k_ptr, page, kv_heads, kv, place, PAGE, D, D_PAD), out_dtype=tl.int32)
        t = s.to(tl.float32) * k_scale[None, :]
        visible = (key + tl.arange(0, BLOCK_N))[None, :] <= last
        m = tl.maximum(m, tl.max(tl.where(visible, t, float("-inf")), 1))
    high = tl.zeros((BLOCK_M, D_PAD), tl.int32)
    low = tl.zeros((BLOCK_M, D_PAD), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.int32)
    for key in range(0, keys, BLOCK_N):
        page = tl.load(tables_ptr + table + key // PAGE)
        place = tl.multiple_of(key % PAGE, BLOCK_N) + tl.arange(0, BLOCK_N)
        k_scale = tl.load(k_scale_ptr + (page.to(tl.int64) * kv_heads + kv) * PAGE + place)
        s = tl.dot(q, _key_tile(k_ptr, page, kv_heads, kv, place, PAGE, D, D_PAD), out_dtype=tl.int32)
        t = s.to(tl.float32) * k_scale[None, :]
        p = nm.attention_weight(t, m[:, None], q_scale, lut_ptr, TABLE)
        visible = (key + tl.arange(0, BLOCK_N))[None, :] <= last
        p = tl.where(visible, p, 0)
        v = _value_tile(v_ptr, page, kv_heads, kv, place, PAGE, D, D_PAD)
        high = tl.dot((p >> 7).to(tl.int8), v, high, out_dtype=tl.int32)
        low = tl.dot((p & 127).to(tl.int8), v, low, out_dtype=tl.int32)
        total += tl.sum(p, 1)
    o = high.to(tl.int64) * 128 + low
    tl.store(o_ptr + at_head[:, None] * D + i[None, :], o, mask=valid[:, None] & (i < D)[None, :])
    tl.store(l_ptr + at_head, total, mask=valid)


@triton.jit
def scores_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    runs_ptr,
    tables_ptr,
    tiles_ptr,
    scores_ptr,
    top_ptr,
    heads,
    kv_heads,
    first_kv,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAXIMA: tl.constexpr,
):
    """Scores of BLOCK_M rows of one KV head with one page of keys; with MAXIMA also the largest t of what each row sees."""
    row, rows, first, start, table, keys, scores_at = _run(runs_ptr, tiles_ptr)
    kv = first_kv + tl.program_id(1)
    packed = first + tl.arange(0, BLOCK_M)
    token = packed // GROUP
    valid = token < rows
    head = tl.program_id(1) * GROUP + packed % GROUP
    at_head = (row + token) * heads + head
    i = tl.arange(0, D_PAD)
    q = tl.load(q_ptr + at_head[:, None] * D + i[None, :], mask=valid[:, None] & (i < D)[None, :], other=0)
    begin = tl.program_id(2) * PAGE
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    to = scores_ptr + scores_at + (head.to(tl.int64) * rows + token)[:, None] * keys
    for key in range(begin, tl.minimum(begin + PAGE, keys), BLOCK_N):
        page = tl.load(tables_ptr + table + tl.program_id(2))
        place = tl.multiple_of(key % PAGE, BLOCK_N) + tl.arange(0, BLOCK_N)
        s = tl.dot(q, _key_tile(k_ptr, page, kv_heads, kv, place, PAGE, D, D_PAD), out_dtype=tl.int32)
        column = key + tl.arange(0, BLOCK_N)
        tl.store(to + column[None, :], s, mask=valid[:, None] & (column < keys)[None, :])
        if MAXIMA:
            k_scale = tl.load(k_scale_ptr + (page.to(tl.int64) * kv_heads + kv) * PAGE + place)
            t = s.to(tl.float32) * k_scale[None, :]
            visible = column[None, :] <= (start + token)[:, None]
            m = tl.maximum(m, tl.max(tl.where(visible, t, float("-inf")), 1))
    if MAXIMA:
        tl.atomic_max(top_ptr + at_head, nm.ordered(m), mask=valid & (begin < keys), sem="relaxed")


@triton.jit
def values_kernel(
    scores_ptr,
    p_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_ptr,
    top_ptr,
    runs_ptr,
    tables_ptr,
    tiles_ptr,
    o_ptr,
    l_ptr,
    lut_ptr,
    heads,
    kv_heads,
    first_kv,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GIVEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Adds one page's share to O and L: of given weights (GIVEN), or of weights from scores and row maxima."""
    row, rows, first, start, table, keys, scores_at = _run(runs_ptr, tiles_ptr)
    kv = first_kv + tl.program_id(1)
    packed = first + tl.arange(0, BLOCK_M)
    token = packed // GROUP
    valid = token < rows
    head = tl.program_id(1) * GROUP + packed % GROUP
    at_head = (row + token) * heads + head
    begin = tl.program_id(2) * PAGE
    at_row = scores_at + (head.to(tl.int64) * rows + token)[:, None] * keys
    high = tl.zeros((BLOCK_M, D_PAD), tl.int32)
    low = tl.zeros((BLOCK_M, D_PAD), tl.int32)
    total = tl.zeros((BLOCK_M,), tl.int32)
    if not GIVEN:
        q_scale = tl.load(q_scale_ptr + at_head, mask=valid, other=0.0)[:, None]
        m = nm.unordered(tl.load(top_ptr + at_head, mask=valid, other=0))[:, None]
    for key in range(begin, tl.minimum(begin + PAGE, keys), BLOCK_N):
        page = tl.load(tables_ptr + table + tl.program_id(2))
        place = tl.multiple_of(key % PAGE, BLOCK_N) + tl.arange(0, BLOCK_N)
        column = key + tl.arange(0, BLOCK_N)
        inside = valid[:, None] & (column < keys)[None, :]
        if GIVEN:
            p = tl.load(p_ptr + at_row + column[None, :], mask=inside, other=0).to(tl.int32)
        else:
            s = tl.load(scores_ptr + at_row + column[None, :], mask=inside, other=0)
            k_scale = tl.load(k_scale_ptr + (page.to(tl.int64) * kv_heads + kv) * PAGE + place)
            t = s.to(tl.float32) * k_scale[None, :]
            p = nm.attention_weight(t, m, q_scale, lut_ptr, TABLE)
            if CAUSAL:
                inside = inside & (column[None, :] <= (start + token)[:, None])
            p = tl.where(inside, p, 0)
        v = _value_tile(v_ptr, page, kv_heads, kv, place, PAGE, D, D_PAD)
        high = tl.dot((p >> 7).to(tl.int8), v, high, out_dtype=tl.int32)
        low = tl.dot((p & 127).to(tl.int8), v, low, out_dtype=tl.int32)
        total += tl.sum(p, 1)
    i = tl.arange(0, D_PAD)
    o = high.to(tl.int64) * 128 + low
    store = valid & (begin < keys)
    tl.atomic_add(o_ptr + at_head[:, None] * D + i[None, :], o, mask=store[:, None] & (i < D)[None, :], sem="relaxed")
    tl.atomic_add(l_ptr + at_head, total, mask=store, sem="relaxed")


@dataclass(frozen=True)
class Shape:
    """What the kernels need to know of the heads: those of the queries at hand, and those of the cache."""

    heads: int
    cache_kv_heads: int
    first_kv: int
    num_kv: int
    d: int

    @property
    def group(self) -> int:
        return self.heads // self.num_kv

    @property
    def d_pad(self) -> int:
        """Inner dimension of an int8 product: at least 32."""
        return next_power_of_two(max(32, self.d))


def _warps(plan: DevicePlan) -> int:
    """Two int32 accumulators of 64 rows do not fit the registers of four warps; 128 rows do not fit those of eight."""
    return 8 if plan.block_m > 32 else 4


class Attention:
    """The three kernels with one choice of the exponential. `table` (64,) int32 is LUT15; `by_table` reads it
    instead of exp2."""

    def __init__(self, table: torch.Tensor, by_table: bool) -> None:
        self._table, self.by_table = table, by_table

    def prefill(
        self,
        shape: Shape,
        q_i8: torch.Tensor,
        q_scale: torch.Tensor,
        pages: KvPages,
        plan: DevicePlan,
        o_i64: torch.Tensor,
        l_i32: torch.Tensor,
    ) -> None:
        """`reference.attention` of all runs of a plan, each over its own start + rows keys. Shapes: q, O (rows,
        heads, d), L (rows, heads)."""
        # Loads of a table's entries do not survive the compiler's pipelining of the loop: one stage there.
        stages = 1 if self.by_table else 2
        launch(
            prefill_kernel, (plan.tiles.shape[0], shape.num_kv), q_i8, q_scale, pages.k, pages.k_scale, pages.v,
            plan.runs, plan.tables, plan.tiles, o_i64, l_i32, self._table, shape.heads, shape.cache_kv_heads, shape.first_kv,
            **self._constants(shape, pages, plan), TABLE=self.by_table,
            num_warps=_warps(plan), num_stages=stages,
        )  # fmt: skip

    def scores(
        self,
        shape: Shape,
        q_i8: torch.Tensor,
        pages: KvPages,
        plan: DevicePlan,
        scores_i32: torch.Tensor,
        top_u32: torch.Tensor | None,
    ) -> None:
        """`reference.gemm_i8` of queries and keys, whether seen or not: per run (heads, rows, keys), at its offset in `scores`.

        top (rows, heads), starting at 0: becomes the row maxima of `reference.attention_weights`, as ordered integers.
        """
        launch(
            scores_kernel, self._grid(shape, pages, plan), q_i8, pages.k, pages.k_scale, plan.runs, plan.tables, plan.tiles,
            scores_i32, scores_i32 if top_u32 is None else top_u32, shape.heads, shape.cache_kv_heads, shape.first_kv,
            **self._constants(shape, pages, plan), MAXIMA=top_u32 is not None,
            num_warps=_warps(plan),
        )  # fmt: skip

    def values(
        self,
        shape: Shape,
        scores_i32: torch.Tensor,
        q_scale: torch.Tensor,
        top_u32: torch.Tensor,
        pages: KvPages,
        plan: DevicePlan,
        o_i64: torch.Tensor,
        l_i32: torch.Tensor,
        *,
        causal: bool = True,
    ) -> None:
        """O and L relative to given maxima, added to what is there: `reference.attention`, or `partial.share_outputs` and
        `share_sums` where not causal."""
        launch(
            values_kernel, self._grid(shape, pages, plan), scores_i32, scores_i32, q_scale, pages.k_scale, pages.v, top_u32,
            plan.runs, plan.tables, plan.tiles, o_i64, l_i32, self._table, shape.heads, shape.cache_kv_heads, shape.first_kv,
            **self._constants(shape, pages, plan), GIVEN=False, CAUSAL=causal, TABLE=self.by_table,
            num_warps=_warps(plan), num_stages=1 if self.by_table else 2,
        )  # fmt: skip

    def weighted_values(
        self,
        shape: Shape,
        p_u16: torch.Tensor,
        pages: KvPages,
        plan: DevicePlan,
        o_i64: torch.Tensor,
        l_i32: torch.Tensor,
    ) -> None:
        """`reference.weighted_values`: O of given weights (heads, rows, keys), added to what is there; L becomes their sums."""
        # The kernel reads weights as int16: below 2**14 that is the same.
        p = p_u16.view(torch.int16)
        launch(
            values_kernel, self._grid(shape, pages, plan), p, p, pages.k_scale, pages.k_scale, pages.v, l_i32,
            plan.runs, plan.tables, plan.tiles, o_i64, l_i32, self._table, shape.heads, shape.cache_kv_heads, shape.first_kv,
            **self._constants(shape, pages, plan), GIVEN=True, CAUSAL=False, TABLE=False, num_warps=_warps(plan),
        )  # fmt: skip

    @staticmethod
    def _grid(shape: Shape, pages: KvPages, plan: DevicePlan) -> tuple[int, int, int]:
        return plan.tiles.shape[0], shape.num_kv, ceil_div(plan.max_keys, pages.page)

    @staticmethod
    def _constants(shape: Shape, pages: KvPages, plan: DevicePlan) -> dict[str, int]:
        block_n = pages.page if interpreted() else 64
        return {
            "GROUP": shape.group,
            "D": shape.d,
            "D_PAD": shape.d_pad,
            "PAGE": pages.page,
            "BLOCK_M": plan.block_m,
            "BLOCK_N": block_n,
        }
