"""Paged keys and values on the device: one table of pages per sequence for all layers, values transposed in their pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import torch
from veriattn.errors import InternalError
from veriattn.spec.kv import PAGE
from veriattn.spec.model import ModelConfig

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class KvPages:
    """What attention of one layer reads.

    Shapes: k (pages, kv_heads, page, d) int8; k_scale (pages, kv_heads, page) float32; v (pages, kv_heads, d, page)
    int8: an int8
    product on tensor cores wants both operands contiguous along the inner dimension, which for P V is the key.
    """

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor

    @property
    def page(self) -> int:
        return int(self.k.shape[2])


class DeviceCache:
    """Keys and values of all layers and sequences. Pages are zeroed when a sequence is freed; the pool doubles up to
    `max_pages`.

    Raises: InternalError where the pool is full.
    """

    def __init__(self, config: ModelConfig, max_pages: int, device: torch.device) -> None:
        self._config, self._max_pages, self._device = config, max_pages, device
        self._free: list[int] = []
        self._num_pages = 0
        self._tables: dict[int, list[int]] = {}
        self._lengths: list[dict[int, int]] = [{} for _ in range(config.num_layers)]
        #: Counts how often the arrays have moved; whoever remembers their addresses looks here.
        self.moves = 0
        self._layers = [self._pages(0) for _ in range(config.num_layers)]

    def _pages(self, count: int) -> KvPages:
        c, new = self._config, lambda *s, dtype: torch.zeros(s, dtype=dtype, device=self._device)
        return KvPages(
            new(count, c.num_kv_heads, PAGE, c.head_dim, dtype=torch.int8),
            new(count, c.num_kv_heads, PAGE, dtype=torch.float32),
            new(count, c.num_kv_heads, c.head_dim, PAGE, dtype=torch.int8),
        )

    def layer(self, layer: int) -> KvPages:
        """The arrays of one layer."""
        return self._layers[layer]

    def table(self, seq_id: int) -> list[int]:
        """Pages of a sequence in order."""
        return self._tables.get(seq_id, [])

    def length(self, layer: int, seq_id: int) -> int:
        """Cached tokens of a sequence in one layer; layers differ in the middle of a step."""
        return self._lengths[layer].get(seq_id, 0)

    def extend(self, layer: int, seq_id: int, count: int) -> None:
        """Advance a sequence's length in one layer."""
        self._lengths[layer][seq_id] = self.length(layer, seq_id) + count

    def reserve(self, seq_id: int, tokens: int) -> None:
        """Make room for a sequence of so many tokens."""
        table = self._tables.setdefault(seq_id, [])
        while len(table) * PAGE < tokens:
            if not self._free:
                self._grow()
            table.append(self._free.pop())

    def slots(self, seq_id: int, start: int, count: int) -> I32:
        """Where the keys at positions start, start + 1, ... are: page * PAGE + place in the page."""
        positions = np.arange(start, start + count)
        table = np.array(self._tables[seq_id], np.int64)
        slots = table[positions // PAGE] * PAGE + positions % PAGE
        return slots.astype(np.int32)

    def free(self, seq_id: int) -> None:
        """Zero and return the sequence's pages."""
        pages = self._tables.pop(seq_id, [])
        if pages:
            index = torch.tensor(pages, dtype=torch.int64, device=self._device)
            for layer in self._layers:
                for array in (layer.k, layer.k_scale, layer.v):
                    array.index_fill_(0, index, 0)
        self._free.extend(pages)
        for lengths in self._lengths:
            lengths.pop(seq_id, None)

    def nonzero_bytes(self) -> int:
        """Bytes that are not zero: none once every sequence has been freed."""
        arrays = [a for p in self._layers for a in (p.k, p.k_scale, p.v)]
        return sum(int(torch.count_nonzero(a.view(torch.uint8))) for a in arrays)

    @property
    def nbytes(self) -> int:
        return sum(a.numel() * a.element_size() for p in self._layers for a in (p.k, p.k_scale, p.v))

    def _grow(self) -> None:
        grown = min(max(8, 2 * self._num_pages), self._max_pages)
        if grown <= self._num_pages:
            raise InternalError("the key/value cache is full", hint="run fewer or shorter sequences at a time")
        for i, old in enumerate(self._layers):
            new = self._pages(grown)
            for a, b in ((new.k, old.k), (new.k_scale, old.k_scale), (new.v, old.v)):
                a[: self._num_pages] = b
                b.zero_()
            self._layers[i] = new
        self._free.extend(range(grown - 1, self._num_pages - 1, -1))
        self._num_pages = grown
        self.moves += 1
