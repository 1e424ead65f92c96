"""Keys and values beyond the prover's capacity: kept here, in blocks that can be streamed and checked one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from veriattn.native import key_projection, value_projection
from veriattn.spec.forward import BatchEntry
from veriattn.spec.kv import PAGE, PagedCache
from veriattn.spec.reference import F32, I8
from veriattn.verifier.checks import ClaimChecker
from veriattn.verifier.keys import REPETITIONS, U64


class OverflowCache:
    """Keys and values beyond the prover's capacity, per layer, with challenge sums that end at every block of 256.

    Position j of a sequence with limit C is entry j - C here, so pages are blocks and any run of blocks is a block table. The
    sum c of a page runs over its own keys and all pages before it, so that of the first n blocks costs one addition.

    Trust: filled from checked operands only. g and c depend on secrets and are overwritten with the rest.
    """

    def __init__(self, checker: ClaimChecker) -> None:
        c = checker.config
        self._checker = checker
        self._layers = [
            PagedCache(
                c.num_kv_heads,
                {
                    "k": (np.dtype(np.int8), (c.head_dim,)),
                    "k_scale": (np.dtype(np.float32), ()),
                    "v": (np.dtype(np.int8), (c.head_dim,)),
                    "g": (np.dtype(np.uint64), (REPETITIONS,)),
                },
                1 << 20,
                {"c": (np.dtype(np.uint64), (REPETITIONS, c.head_dim))},
            )
            for _ in range(c.num_layers)
        ]

    def append(self, layer: int, entry: BatchEntry, limit: int, k_i8: I8, k_scale: F32, v_i8: I8) -> None:
        """Store a run that lies beyond the limit. Shapes: k, v (tokens, kv_heads, d), k_scale (tokens, kv_heads)."""
        cache, keys = self._layers[layer], self._checker.keys
        at = entry.start - limit
        cache.extend(entry.seq_id, entry.num_tokens)
        cache.write(entry.seq_id, at, k=k_i8, k_scale=k_scale, v=v_i8, g=value_projection(v_i8, keys.attention(layer)))
        r, sums, table = (
            keys.positions(entry.start + entry.num_tokens),
            cache.page_arrays["c"],
            cache.table(entry.seq_id),
        )
        done = 0
        while done < entry.num_tokens:
            block, offset = divmod(at + done, PAGE)
            if offset == 0 and block > 0:
                sums[table[block]] = sums[table[block - 1]]
            n = min(PAGE - offset, entry.num_tokens - done)
            part = np.ascontiguousarray(k_i8[done : done + n])
            key_projection(part, r, entry.start + done, sums[table[block]])
            done += n

    def layer(self, layer: int) -> PagedCache:
        """Keys and values of a layer beyond the limit."""
        return self._layers[layer]

    @property
    def layers(self) -> Sequence[PagedCache]:
        return self._layers

    def challenge_sum(self, layer: int, seq_id: int, blocks: int, resident: U64) -> U64:
        """sum_j r_j k_j over the resident keys, whose sum is given, and the first blocks, mod p, (kv_heads, 2, d)."""
        if blocks == 0:
            return resident
        cache = self._layers[layer]
        total: U64 = (resident + cache.page_arrays["c"][cache.table(seq_id)[blocks - 1]]) % self._checker.prime
        return total

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""
        for cache in self._layers:
            cache.free(seq_id)

    def close(self) -> None:
        """Overwrite and drop everything."""
        for seq_id in {s for layer in self._layers for s in layer.sequences()}:
            self.free(seq_id)

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self._layers)
