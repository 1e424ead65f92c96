"""The arithmetic of a prover in torch, on the CPU or a GPU. Never imported on the trusted side."""

from __future__ import annotations

from typing import Any

import numpy as np

import torch
from veriattn.floatmode.formats import Array
from veriattn.floatmode.params import Format

Tensor = Any
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchArithmetic:
    """Tensors of the format; matrix products and exponentials as torch's kernels for it do them."""

    def __init__(self, fmt: Format, device: str) -> None:
        self.device = f"torch {torch.__version__} {device}"
        self._device = torch.device(device)
        self._type = _TYPES[fmt]
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_grad_enabled(False)

    def put(self, x: Array) -> Tensor:
        return torch.from_numpy(np.array(x, np.float32)).to(self._device, self._type)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=self._type, device=self._device)

    def concat(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b)

    def transposed(self, a: Tensor) -> Tensor:
        return a.transpose(-1, -2)

    def scores(self, keys: Tensor, queries: Tensor, scale: float) -> Tensor:
        return torch.matmul(keys, queries.transpose(-1, -2)) * scale

    def exponentials(self, scores: Tensor, visible: Array | None, shift: bool) -> tuple[Array, Tensor]:
        s = scores.to(torch.float32)
        if visible is not None:
            s = s.masked_fill(~torch.from_numpy(visible).to(self._device), float("-inf"))
        top = s.amax(dim=1) if shift else torch.zeros((s.shape[0], s.shape[2]), device=self._device)
        return top.cpu().numpy(), torch.exp(s - top[:, None, :])

    def claim(self, x: Tensor, fmt: Format) -> Array:
        out = x.to(_TYPES[fmt]).contiguous().cpu()
        if fmt == "bfloat16":
            return np.asarray(out.view(torch.int16).numpy()).view(np.uint16)
        return np.asarray(out.numpy())

    def round_to(self, x: Tensor, fmt: Format) -> Tensor:
        return x.to(_TYPES[fmt]).to(self._type)
