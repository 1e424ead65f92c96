"""One way to start every kernel: no contraction, and a list of what would be started, for compiling without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.runtime.interpreter import InterpretedFunction

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel as it was started: positional arguments, constants and the compiler's options."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Recording:
    """Launches that were noted in place of being run."""

    launches: list[Launch] = field(default_factory=list)


_recordings: list[Recording] = []


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Launches in this context are noted and not run; their tensors may be on the `meta` device."""
    noted = Recording()
    _recordings.append(noted)
    try:
        yield noted
    finally:
        _recordings.remove(noted)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1` when this package was imported)."""
    return isinstance(_probe, InterpretedFunction)


@triton.jit
def _probe():
    return


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Start `kernel` on a grid. A fused multiply-add rounds once where the specification rounds twice: switched off here."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if _recordings:
        _recordings[-1].launches.append(Launch(kernel, args, constants, options))
        return
    if 0 in grid:
        return
    kernel[grid](*args, **constants, **options)


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tile_rows(on_device: int) -> int:
    """Rows of one program of an elementwise kernel. The interpreter pays per operation, not per element: more rows there."""
    return 32 if interpreted() else on_device


def pointer_or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A tensor for an argument that the kernel does not read."""
    return other if tensor is None else tensor
