"""int8 matrix products into int32: a Triton kernel for any shape, cuBLAS where it fits and was faster."""

from __future__ import annotations

import triton
import triton.language as tl

import torch
from veriattn.prover.cuda.launch import ceil_div, interpreted, launch, next_power_of_two

#: Thread blocks that keep a large GPU busy; fewer than that and the sum over K is cut, which is exact in integers.
_BUSY = 264


@triton.jit
def gemm_i8_kernel(
    a_ptr,
    w_ptr,
    y_ptr,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """y (m, n) = a (m, k) @ w (n, k).T; with SPLIT_K > 1 it is added to y, which starts at 0."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    # Blocks that run at the same time share rows of a and w in L2.
    per_group = GROUP_M * tiles_n
    group = tl.program_id(0) // per_group
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (tl.program_id(0) % per_group) % group_size
    tile_n = (tl.program_id(0) % per_group) // group_size
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows beyond the end repeat others and are not stored: the loop needs no mask for them.
    a_ptrs = a_ptr + (rows % m).to(tl.int64)[:, None] * k + inner[None, :]
    w_ptrs = w_ptr + (columns % n).to(tl.int64)[None, :] * k + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(tl.program_id(1) * BLOCK_K, k, BLOCK_K * SPLIT_K):
        if EVEN_K:
            a, w = tl.load(a_ptrs), tl.load(w_ptrs)
        else:
            left = k - first
            a = tl.load(a_ptrs, mask=tl.arange(0, BLOCK_K)[None, :] < left, other=0)
            w = tl.load(w_ptrs, mask=tl.arange(0, BLOCK_K)[:, None] < left, other=0)
        acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K * SPLIT_K
        w_ptrs += BLOCK_K * SPLIT_K
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if SPLIT_K == 1:
        tl.store(y_ptrs, acc, mask=inside)
    else:
        tl.atomic_add(y_ptrs, acc, mask=inside, sem="relaxed")


def gemm_i8(a_i8: torch.Tensor, w_i8: torch.Tensor, y_i32: torch.Tensor) -> None:
    """y = a @ w.T, `reference.gemm_i8`. Shapes: a (m, k), w (n, k), y (m, n), all contiguous. Bounds: k <= 131071."""
    (m, k), n = a_i8.shape, w_i8.shape[0]
    if interpreted():
        block = (next_power_of_two(max(16, min(m, 128))), 128, next_power_of_two(max(32, min(k, 256))), 1)
        split, warps, stages = (2 if m <= 2 and k > 64 else 1), 4, 1
    elif m > 64:
        block, split, warps, stages = (128, 256, 128, 8), 1, 8, 3
        if ceil_div(m, 128) * ceil_div(n, 256) < _BUSY // 2:
            block, warps = (128, 128, 128, 8), 4
    else:
        # Few rows: the weights' way from memory decides, so many blocks read them at once.
        block, warps, stages = (next_power_of_two(max(16, m)), 64, 128, 1), 4, 4
        split = max(1, min(_BUSY // ceil_div(n, 64), ceil_div(k, 512)))
    if split > 1:
        y_i32.zero_()
    grid = (ceil_div(m, block[0]) * ceil_div(n, block[1]), split)
    launch(
        gemm_i8_kernel, grid, a_i8, w_i8, y_i32, m, n, k,
        BLOCK_M=block[0], BLOCK_N=block[1], BLOCK_K=block[2], GROUP_M=block[3], SPLIT_K=split,
        EVEN_K=k % (block[2] * split) == 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def fits_cublas(m: int, n: int, k: int) -> bool:
    """Whether `torch._int_mm` takes the shape."""
    return m > 16 and n % 8 == 0 and k % 8 == 0


def gemm_cublas(a_i8: torch.Tensor, w_i8: torch.Tensor, y_i32: torch.Tensor) -> None:
    """The same by `torch._int_mm`; integers leave it no room for other bits. Shapes must satisfy `fits_cublas`."""
    torch._int_mm(a_i8, w_i8.t(), out=y_i32)


class Gemm:
    """Chooses between the two for each matrix, by measuring once per range of row counts; both give the same bits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cublas: dict[tuple[int, int, int], bool] = {}

    def __call__(self, a_i8: torch.Tensor, w_i8: torch.Tensor, y_i32: torch.Tensor) -> None:
        """See `gemm_i8`."""
        (m, k), n = a_i8.shape, w_i8.shape[0]
        if self._device.type == "cuda" and fits_cublas(m, n, k):
            shape = (m.bit_length(), n, k)
            if shape not in self._cublas:
                self._cublas[shape] = self._faster_by_cublas(a_i8, w_i8, y_i32)
            if self._cublas[shape]:
                gemm_cublas(a_i8, w_i8, y_i32)
                return
        gemm_i8(a_i8, w_i8, y_i32)

    def _faster_by_cublas(self, a_i8: torch.Tensor, w_i8: torch.Tensor, y_i32: torch.Tensor) -> bool:
        if torch.cuda.is_current_stream_capturing():
            return False
        times: list[float] = []
        for function in (gemm_i8, gemm_cublas):
            function(a_i8, w_i8, y_i32)  # compiles, warms up
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            for _ in range(3):
                function(a_i8, w_i8, y_i32)
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended))
        return times[1] < times[0]

    def choices(self) -> dict[tuple[int, int, int], bool]:
        """What was chosen so far: (bits of the row count, out, in) -> by cuBLAS."""
        return dict(self._cublas)
