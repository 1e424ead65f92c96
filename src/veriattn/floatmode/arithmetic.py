"""The arithmetic of a prover in one floating-point format: NumPy here; torch where it is installed (torch_arithmetic)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from veriattn.floatmode.formats import Array, encode, rounded
from veriattn.floatmode.params import Format

Tensor = Any


class Arithmetic(Protocol):
    """Operations on tensors of the format; `put` rounds float32 into it, `claim` gives wire values."""

    device: str

    def put(self, x: Array) -> Tensor: ...

    def zeros(self, shape: tuple[int, ...]) -> Tensor: ...

    def concat(self, parts: list[Tensor]) -> Tensor:
        """Along the axis before the last."""
        ...

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, batched, rounded to the format."""
        ...

    def transposed(self, a: Tensor) -> Tensor:
        """Last two axes swapped."""
        ...

    def scores(self, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
        """(keys @ queries.T) * scale: (kv, keys, rows)."""
        ...

    def exponentials(self, scores: Tensor, visible: Array | None, shift: bool) -> tuple[Array, Tensor]:
        """Row shifts, float32 (kv, rows), and exp(scores - shift), 0 where not visible (keys, rows)."""
        ...

    def claim(self, x: Tensor, fmt: Format) -> Array: ...

    def round_to(self, x: Tensor, fmt: Format) -> Tensor:
        """Values of `fmt`, so that what is used is what was claimed."""
        ...


class NumpyArithmetic:
    """float32 arrays whose values are rounded to the format after every operation; products accumulate in float32."""

    device = "cpu"

    def __init__(self, fmt: Format) -> None:
        self.format = fmt

    def put(self, x: Array) -> Tensor:
        return rounded(x, self.format)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return np.zeros(shape, np.float32)

    def concat(self, parts: list[Tensor]) -> Tensor:
        return np.concatenate(parts, axis=-2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return rounded(a @ b, self.format)

    def transposed(self, a: Tensor) -> Tensor:
        return np.swapaxes(a, -1, -2)

    def scores(self, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
        s = keys @ np.swapaxes(queries, -1, -2)
        s *= np.float32(scale)
        return rounded(s, self.format)

    def exponentials(self, scores: Tensor, visible: Array | None, shift: bool) -> tuple[Array, Tensor]:
        s = np.array(scores, np.float32)
        if visible is not None:
            s[:, ~visible] = -np.inf
        top = s.max(axis=1) if shift else np.zeros((s.shape[0], s.shape[2]), np.float32)
        s -= top[:, None, :]
        with np.errstate(over="ignore", under="ignore"):
            np.exp(s, out=s)
        return top, s

    def claim(self, x: Tensor, fmt: Format) -> Array:
        return encode(x, fmt)

    def round_to(self, x: Tensor, fmt: Format) -> Tensor:
        return rounded(x, fmt)


def open_arithmetic(backend: str, device: str, fmt: Format) -> Arithmetic:
    """`numpy`, or `torch` on a device. Raises: ImportError where torch is not installed; ValueError."""
    if backend == "numpy":
        return NumpyArithmetic(fmt)
    if backend == "torch":
        from veriattn.floatmode.torch_arithmetic import TorchArithmetic  # noqa: PLC0415

        return TorchArithmetic(fmt, device)
    raise ValueError(f"unknown backend {backend!r}")
