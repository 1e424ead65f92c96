"""The two operations computed right here: for `full-tee`, for the CPU prover and for calibration."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from veriattn.spec import reference
from veriattn.spec.forward import AttentionInput, Batch
from veriattn.spec.kv import PagedCache, attention_cache
from veriattn.spec.model import ModelConfig
from veriattn.spec.reference import I8, I32, I64



class LocalOperations:
    """Linears from packed weights and attention over one paged cache per layer.

    `weights` maps a linear's name to what `kernels.pack` made of it. `kernels` is `spec.reference` or
    `native.kernels`; both give the same bits.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Callable[[str], Any],
        kernels: ModuleType = reference,
        *,
        max_pages: int = 1 << 20,
    ) -> None:
        self._config = config
        self._weights = weights
        self._kernels = kernels
        self._caches: list[PagedCache] = [
            attention_cache(config.num_kv_heads, config.head_dim, max_pages) for _ in range(config.num_layers)
        ]

    def linear(self, name: str, a_i8: I8) -> I32:
        """See `Operations.linear`."""
        y: I32 = self._kernels.gemm_packed(self._weights(name), a_i8)
        return y

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """See `Operations.attention`."""
        cache = self._caches[layer]
        parts = []
        for entry, rows in zip(batch.entries, batch.slices(), strict=True):
            cache.extend(entry.seq_id, entry.num_tokens)
            cache.write(entry.seq_id, entry.start, k=x.k_i8[rows], k_scale=x.k_scale[rows], v=x.v_i8[rows])
            a = cache.arrays
            table = cache.table(entry.seq_id)
            parts.append(
                self._kernels.attention(
                    x.q_i8[rows], x.q_scale[rows], a["k"], a["k_scale"], a["v"], table, entry.start
                )
            )
        if len(parts) == 1:
            o, row_sum = parts[0]
            return o, row_sum
        return np.concatenate([o for o, _ in parts]), np.concatenate([s for _, s in parts])

    def scores(self, layer: int, seq_id: int, q_i8: I8) -> I32:
        """Exact q.k of one run's queries with every cached key of its sequence, for the transfer check.

        Shapes: q (tokens, heads, d) -> (heads, tokens, keys). Keys that a query does not see are there all the same.
        """
        k = self._caches[layer].gather(seq_id, "k")
        group = self._config.num_heads // self._config.num_kv_heads
        return np.stack(
            [
                self._kernels.gemm_i8(np.ascontiguousarray(q_i8[:, h]), np.ascontiguousarray(k[:, h // group]))
                for h in range(self._config.num_heads)
            ]
        )

    def length(self, seq_id: int) -> int:
        """Cached tokens of a sequence."""
        return self._caches[-1].length(seq_id)

    def free(self, seq_id: int) -> None:
        """Forget a sequence; its pages are zeroed."""
        for cache in self._caches:
            cache.free(seq_id)

    @property
    def cache_bytes(self) -> int:
        return sum(c.nbytes for c in self._caches)
