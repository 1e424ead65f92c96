"""Layers whose attention and projections never leave the TEE: those whose cache would tell most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from veriattn.native import kernels
from veriattn.spec.forward import AttentionInput, Batch
from veriattn.spec.kv import PagedCache
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import ModelConfig
from veriattn.spec.modelfile import ModelDirectory
from veriattn.spec.reference import I8, I32, I64


class OwnLayers:
    """q, k, v and output projections and attention of the first `count` layers, computed here from hashed weights.

    Trust: nothing of it is outsourced, so nothing is checked. Raises: ModelError while the weights are read.
    """

    def __init__(self, config: ModelConfig, count: int, matrices: dict[str, I8]) -> None:
        self.count = count
        self._weights = {name: kernels.pack(w) for name, w in matrices.items()}
        self._local = LocalOperations(config, self._weights.__getitem__, kernels)

    def has(self, name: str) -> bool:
        """Whether a linear is computed here."""
        return name in self._weights

    def linear(self, name: str, a_i8: I8) -> I32:
        """See `Operations`; computed here, so it needs no check."""
        return self._local.linear(name, a_i8)

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """See `Operations`; computed here, over a cache of its own."""
        return self._local.attention(layer, batch, x)

    @property
    def caches(self) -> Sequence[PagedCache]:
        """Of the layers that are computed here."""
        return self._local.caches[: self.count]

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""
        self._local.free(seq_id)


def read_matrices(directory: ModelDirectory, names: set[str]) -> dict[str, I8]:
    """Some weight matrices of a model, hashed with all the rest of the file. Raises: ModelError."""
    shapes = directory.config.linear_shapes()
    out = {name: np.empty(shapes[name], np.int8) for name in names}
    for tensor, first, chunk in directory.stream():
        name = tensor.removesuffix(".weight")
        if name in out and name != tensor:
            out[name][first : first + chunk.shape[0]] = chunk
    return out
