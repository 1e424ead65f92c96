"""SiLU, Hadamard and quantisation between gate_up and down, in two kernels: the row maximum is known only after all blocks."""

from __future__ import annotations

import triton
import triton.language as tl

import torch
from veriattn.prover.cuda import numerics as nm
from veriattn.prover.cuda.launch import ceil_div, launch, next_power_of_two, tile_rows
from veriattn.spec.constants import largest_power_of_two_divisor


@triton.jit
def silu_hadamard_kernel(
    y_ptr,
    a_scale_ptr,
    w_scale_ptr,
    h_ptr,
    top_ptr,
    flag_ptr,
    rows,
    width,
    LOG_HADAMARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    a_scale = tl.load(a_scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    g_scale = tl.load(w_scale_ptr + column, mask=column < width, other=0.0)[None, :]
    u_scale = tl.load(w_scale_ptr + width + column, mask=column < width, other=0.0)[None, :]
    g = (tl.load(y_ptr + at, mask=inside, other=0).to(tl.float32) * g_scale) * a_scale
    u = (tl.load(y_ptr + at + width, mask=inside, other=0).to(tl.float32) * u_scale) * a_scale
    z = tl.minimum(tl.maximum(g * nm.MINUS_LOG2E, -48.0), 48.0)
    h = tl.div_rn(g, nm.sigmoid_exp2(z) + 1.0) * u
    nm.raise_flag(flag_ptr, tl.max(nm.abs_bits(h), 1))
    h = nm.hadamard(h, ROWS, BLOCK, LOG_HADAMARD)
    tl.store(h_ptr + row.to(tl.int64)[:, None] * width + column[None, :], h, mask=inside)
    tl.atomic_max(top_ptr + row, tl.max(nm.abs_bits(h), 1), mask=row < rows, sem="relaxed")


@triton.jit
def quantise_kernel(
    x_ptr,
    top_ptr,
    a_ptr,
    scale_ptr,
    flag_ptr,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    top = tl.load(top_ptr + row, mask=row < rows, other=0)
    nm.raise_flag(flag_ptr, top)
    m = nm.floored(top)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    tl.store(a_ptr + at, nm.round_i8(x * nm.over(127.0, m)[:, None]), mask=inside)
    tl.store(scale_ptr + row, nm.by(m, 127.0), mask=(row < rows) & (tl.program_id(1) == 0))


def mlp_epilogue(
    y_i32: torch.Tensor,
    a_scale: torch.Tensor,
    w_scale: torch.Tensor,
    h: torch.Tensor,
    top_i32: torch.Tensor,
    a_i8: torch.Tensor,
    out_scale: torch.Tensor,
    flag: torch.Tensor,
) -> None:
    """`reference.mlp_epilogue`. Shapes: y (rows, 2 n) -> a (rows, n), out_scale (rows,). h (rows, n) float32 and top
    (rows,) are room
    to work in; top starts at 0."""
    rows, width = a_i8.shape
    hadamard = largest_power_of_two_divisor(width)
    block = max(hadamard, min(1024, next_power_of_two(width)))
    per = tile_rows(1)
    grid = (ceil_div(rows, per), ceil_div(width, block))
    launch(
        silu_hadamard_kernel, grid, y_i32, a_scale, w_scale, h, top_i32, flag, rows, width,
        LOG_HADAMARD=hadamard.bit_length() - 1, ROWS=per, BLOCK=block, num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip
    block = min(2048, next_power_of_two(width))
    grid = (ceil_div(rows, per), ceil_div(width, block))
    launch(quantise_kernel, grid, h, top_i32, a_i8, out_scale, flag, rows, width, ROWS=per, BLOCK=block)
