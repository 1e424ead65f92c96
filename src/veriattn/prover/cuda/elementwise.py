"""Embedding, norm, residual, logits and the quantisation of attention's output: one row or more per program."""

from __future__ import annotations

import triton
import triton.language as tl

import torch
from veriattn.prover.cuda import numerics as nm
from veriattn.prover.cuda.launch import ceil_div, launch, next_power_of_two, tile_rows


@triton.jit
def gather_rows_kernel(table_ptr, index_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + row, mask=row < rows, other=0).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(table_ptr + index[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * width + column[None, :], x.to(tl.float32), mask=inside)


def gather_rows(table: torch.Tensor, index_i32: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = float(table[index[i]]): embeddings, and the rows whose logits are asked for. Shapes: (any, n),
    (rows,), (rows, n)."""
    rows, width = out.shape
    block = min(1024, next_power_of_two(width))
    per = tile_rows(1)
    grid = (ceil_div(rows, per), ceil_div(width, block))
    launch(gather_rows_kernel, grid, table, index_i32, out, rows, width, ROWS=per, BLOCK=block)


@triton.jit
def norm_quantise_kernel(
    x_ptr,
    a_ptr,
    scale_ptr,
    flag_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * WIDTH
    valid = (row < rows)[:, None]
    bits = tl.zeros((ROWS, BLOCK), tl.int32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + at + column, mask=valid & (column < WIDTH), other=0.0)
        bits = tl.maximum(bits, nm.abs_bits(x))
    top = tl.max(bits, 1)
    nm.raise_flag(flag_ptr, top)
    m = nm.floored(top)
    to_i8, to_i16 = nm.over(127.0, m)[:, None], nm.over(32767.0, m)[:, None]
    squares = tl.zeros((ROWS, BLOCK), tl.int64)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        inside = valid & (column < WIDTH)
        x = tl.load(x_ptr + at + column, mask=inside, other=0.0)
        tl.store(a_ptr + at + column, nm.round_i8(x * to_i8), mask=inside)
        b = nm.round_i16(x * to_i16).to(tl.int64)
        squares += b * b
    rstd = nm.reciprocal_rms(tl.sum(squares, 1), WIDTH, nm.by(m, 32767.0), eps)
    tl.store(scale_ptr + row, nm.by(m, 127.0) * rstd, mask=row < rows)


def norm_quantise(x: torch.Tensor, eps: float, a_i8: torch.Tensor, a_scale: torch.Tensor, flag: torch.Tensor) -> None:
    """`reference.norm_quantise`. Shapes: x (rows, n) -> a (rows, n), a_scale (rows,); flag becomes 1 for a `NumericsError`."""
    rows, width = x.shape
    per = tile_rows(1)
    block = min(4096, next_power_of_two(width))
    launch(
        norm_quantise_kernel, (ceil_div(rows, per),), x, a_i8, a_scale, flag, rows, eps,
        WIDTH=width, ROWS=per, BLOCK=block, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip


@triton.jit
def dequantise_kernel(
    y_ptr,
    w_scale_ptr,
    a_scale_ptr,
    x_ptr,
    out_ptr,
    rows,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    y = tl.load(y_ptr + at, mask=inside, other=0).to(tl.float32)
    w_scale = tl.load(w_scale_ptr + column, mask=column < width, other=0.0)
    a_scale = tl.load(a_scale_ptr + row, mask=row < rows, other=0.0)
    v = (y * w_scale[None, :]) * a_scale[:, None]
    if ADD:
        v = tl.load(x_ptr + at, mask=inside, other=0.0) + v
    tl.store(out_ptr + at, v, mask=inside)


def _dequantise(
    y_i32: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, x: torch.Tensor | None, out: torch.Tensor
) -> None:
    rows, width = y_i32.shape
    block, per = min(1024, next_power_of_two(width)), tile_rows(1)
    grid = (ceil_div(rows, per), ceil_div(width, block))
    launch(
        dequantise_kernel, grid, y_i32, w_scale, a_scale, out if x is None else x, out, rows, width,
        ADD=x is not None, ROWS=per, BLOCK=block,
    )  # fmt: skip


def residual_add(
    x: torch.Tensor, y_i32: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor
) -> None:
    """`reference.residual_add` without a bias; `out` may be x. Shapes: x, y, out (rows, n), a_scale (rows,), w_scale (n,)."""
    _dequantise(y_i32, a_scale, w_scale, x, out)


def logits(y_i32: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor) -> None:
    """`reference.logits`. Shapes: y, out (rows, vocab), a_scale (rows,), w_scale (vocab,)."""
    _dequantise(y_i32, a_scale, w_scale, None, out)


@triton.jit
def attention_epilogue_kernel(
    o_ptr,
    l_ptr,
    v_scale_ptr,
    a_ptr,
    scale_ptr,
    flag_ptr,
    rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * (HEADS * D)
    valid = (row < rows)[:, None]
    bits = tl.zeros((ROWS, BLOCK), tl.int32)
    to_i8 = tl.zeros((ROWS, 1), tl.float32)
    # Twice over the row: once for the maximum, once for the result.
    for go in tl.static_range(2):
        for first in range(0, HEADS * D, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            inside = valid & (column < HEADS * D)
            head = column // D
            o = tl.load(o_ptr + at + column, mask=inside, other=0).to(tl.float32)
            total = tl.load(l_ptr + row[:, None] * HEADS + head, mask=inside, other=1).to(tl.float32)
            v_scale = tl.load(v_scale_ptr + head // GROUP, mask=column < HEADS * D, other=0.0)
            x = tl.div_rn(o, total) * v_scale
            if go == 0:
                bits = tl.maximum(bits, tl.where(inside, nm.abs_bits(x), 0))
            else:
                tl.store(a_ptr + at + column, nm.round_i8(x * to_i8), mask=inside)
        if go == 0:
            top = tl.max(bits, 1)
            nm.raise_flag(flag_ptr, top)
            m = nm.floored(top)
            to_i8 = nm.over(127.0, m)[:, None]
            tl.store(scale_ptr + row, nm.by(m, 127.0), mask=row < rows)


def attention_epilogue(
    o_i64: torch.Tensor,
    l_i32: torch.Tensor,
    v_scale: torch.Tensor,
    a_i8: torch.Tensor,
    a_scale: torch.Tensor,
    flag: torch.Tensor,
) -> None:
    """`reference.attention_epilogue`. Shapes: O (rows, heads, d), L (rows, heads), v_scale (kv_heads,) -> (rows,
    heads * d), (rows,)."""
    rows, heads, d = o_i64.shape
    per, block = tile_rows(1), min(1024, next_power_of_two(heads * d))
    launch(
        attention_epilogue_kernel, (ceil_div(rows, per),), o_i64, l_i32, v_scale, a_i8, a_scale, flag, rows,
        HEADS=heads, GROUP=heads // v_scale.shape[0], D=d, ROWS=per, BLOCK=block,
    )  # fmt: skip
