"""Paged storage for keys and values; the layout that attention kernels read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from veriattn.errors import InternalError

#: Keys per page; also the unit in which challenge sums are kept and a cache is split between prover and verifier.
PAGE = 256


class PagedCache:
    """Named per-key arrays of many sequences in pages of `PAGE` keys, one table of pages per sequence.

    Each array has shape (pages, kv_heads, PAGE, *tail); `page_fields` make arrays (pages, kv_heads, *tail) in `page_arrays`.
    Pages are zeroed when a sequence is freed. The pool grows by doubling up to `max_pages`, or by `grow`.

    Raises: InternalError for unknown sequences, and when the pool is full.
    """

    def __init__(
        self,
        kv_heads: int,
        fields: dict[str, tuple[np.dtype[Any], tuple[int, ...]]],
        max_pages: int,
        page_fields: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] | None = None,
    ) -> None:
        self._kv_heads = kv_heads
        self._fields = fields
        self._max_pages = max_pages
        self._free: list[int] = []
        self._num_pages = 0
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._table_arrays: dict[int, np.ndarray[tuple[int], np.dtype[np.int32]]] = {}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {
            name: np.zeros((0, kv_heads, PAGE, *tail), dtype) for name, (dtype, tail) in fields.items()
        }
        self.page_arrays: dict[str, np.ndarray[Any, Any]] = {
            name: np.zeros((0, kv_heads, *tail), dtype) for name, (dtype, tail) in (page_fields or {}).items()
        }

    def length(self, seq_id: int) -> int:
        """Cached keys of a sequence; 0 for one never seen."""
        return self._lengths.get(seq_id, 0)

    def table(self, seq_id: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Block table: indices of the sequence's pages in order. Not to be written to."""
        kept = self._table_arrays.get(seq_id)
        if kept is None:
            kept = self._table_arrays[seq_id] = np.array(self._tables.get(seq_id, []), dtype=np.int32)
        return kept

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for arrays in self._pools() for a in arrays.values())

    @property
    def pages(self) -> int:
        """Pages in the pool, in use or not."""
        return self._num_pages

    @property
    def page_bytes(self) -> int:
        """Memory of one page."""
        return sum(int(np.prod(a.shape[1:])) * a.itemsize for arrays in self._pools() for a in arrays.values())

    def pages_short(self, runs: Iterable[tuple[int, int]]) -> int:
        """How many pages more the pool needs for so many new keys (seq_id, count) of some sequences."""
        new = sum(-(-(self.length(s) + n) // PAGE) - len(self._tables.get(s, ())) for s, n in runs)
        return max(0, new - len(self._free))

    def _pools(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
        return self.arrays, self.page_arrays

    def extend(self, seq_id: int, count: int) -> None:
        """Make room for `count` more keys and advance the length."""
        table = self._tables.setdefault(seq_id, [])
        length = self._lengths.get(seq_id, 0) + count
        while len(table) * PAGE < length:
            table.append(self._take_page())
            self._table_arrays.pop(seq_id, None)
        self._lengths[seq_id] = length

    def extend_all(self, runs: list[tuple[int, int]]) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
        """`extend` by (sequence, count) for each of `runs`; returns their block tables."""
        out, lengths, kept = [], self._lengths, self._table_arrays
        for seq_id, count in runs:
            table, length = kept.get(seq_id), lengths.get(seq_id, 0) + count
            if table is None or len(table) * PAGE < length:
                self.extend(seq_id, count)
                table = self.table(seq_id)
            else:
                lengths[seq_id] = length
            out.append(table)
        return out

    def head_table(self, seq_id: int, kv_head: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Block table of one KV head in `head_arrays`."""
        return self.table(seq_id) * np.int32(self._kv_heads) + np.int32(kv_head)

    def head_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The same memory seen as (pages * kv_heads, 1, PAGE, *tail): kernels then work on one KV head, nothing is copied."""
        return {name: a.reshape(-1, 1, *a.shape[2:]) for name, a in self.arrays.items()}

    def write(self, seq_id: int, start: int, heads: slice = slice(None), **values: np.ndarray[Any, Any]) -> None:
        """Store per-key values of some KV heads, each (tokens, heads, *tail), at positions start, start + 1, ..."""
        table = self._tables[seq_id]
        for name, value in values.items():
            array, at = self.arrays[name], 0
            if start + value.shape[0] > self._lengths[seq_id]:
                raise InternalError("cache write beyond the sequence's length")
            if value.shape[0] == 1:  # as in decoding, sequence by sequence and layer by layer
                page, offset = divmod(start, PAGE)
                array[table[page], heads, offset] = value[0]
                continue
            while at < value.shape[0]:
                page, offset = divmod(start + at, PAGE)
                n = min(PAGE - offset, value.shape[0] - at)
                array[table[page], heads, offset : offset + n] = value[at : at + n].swapaxes(0, 1)
                at += n

    def gather(self, seq_id: int, name: str) -> np.ndarray[Any, Any]:
        """Contiguous copy (keys, kv_heads, *tail) of one field of a sequence."""
        pages = self.arrays[name][self.table(seq_id)]
        flat = pages.swapaxes(1, 2).reshape(-1, self._kv_heads, *self._fields[name][1])
        return flat[: self.length(seq_id)]

    def free(self, seq_id: int) -> None:
        """Zero and return the sequence's pages."""
        for page in self._tables.pop(seq_id, []):
            for arrays in self._pools():
                for a in arrays.values():
                    a[page] = 0
            self._free.append(page)
        self._lengths.pop(seq_id, None)
        self._table_arrays.pop(seq_id, None)

    def sequences(self) -> list[int]:
        """Ids of the sequences that have entries here."""
        return list(self._tables)

    def _take_page(self) -> int:
        if not self._free:
            grown = min(max(8, 2 * self._num_pages), self._max_pages)
            if grown <= self._num_pages:
                raise InternalError("the key/value cache is full", hint="run fewer or shorter sequences at a time")
            self.grow(grown - self._num_pages)
        return self._free.pop()

    def grow(self, pages: int) -> None:
        """Add pages to the pool; what the arrays were is overwritten when they have moved."""
        total = self._num_pages + pages
        for arrays in self._pools():
            for name, a in arrays.items():
                bigger = np.zeros((total, *a.shape[1:]), a.dtype)
                bigger[: self._num_pages] = a
                a[...] = 0
                arrays[name] = bigger
        self._free.extend(range(total - 1, self._num_pages - 1, -1))
        self._num_pages = total


def attention_cache(kv_heads: int, head_dim: int, max_pages: int) -> PagedCache:
    """Keys, their scales and values, as attention needs them."""
    return PagedCache(
        kv_heads,
        {
            "k": (np.dtype(np.int8), (head_dim,)),
            "k_scale": (np.dtype(np.float32), ()),
            "v": (np.dtype(np.int8), (head_dim,)),
        },
        max_pages,
    )
