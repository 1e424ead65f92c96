"""The two operations computed right here: for `full-tee`, for the CPU prover and for calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.spec import reference
from veriattn.spec.forward import AttentionInput, Batch, StepContext
from veriattn.spec.kv import PagedCache, attention_cache
from veriattn.spec.model import LayerTensors, ModelConfig
from veriattn.spec.reference import F32, I8, I32, I64


@dataclass
class _Fused:
    """A layer as one call, and the weights that it was made of."""

    names: list[str]
    weights: list[Any]
    run: Any


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
        self._make_layer = getattr(kernels, "local_layer", None)
        self._fused: dict[int, _Fused] = {}
        self._caches: list[PagedCache] = [
            attention_cache(config.num_kv_heads, config.head_dim, max_pages) for _ in range(config.num_layers)
        ]

    def linear(self, name: str, a_i8: I8) -> I32:
        """See `Operations.linear`."""
        y: I32 = self._kernels.gemm_packed(self._weights(name), a_i8)
        return y

    def fused_layer(
        self, ctx: StepContext, i: int, layer: LayerTensors, x: F32, claims: tuple[Any, ...] | None = None
    ) -> F32 | None:
        """See `FusedOperations`; `kernels` decides whether it has such a thing. claims: filled where given, in the order
        of the forward pass, also where NumericsError is raised."""
        make = self._make_layer
        if make is None or ctx.kernels is not self._kernels:
            return None
        get, kept = self._weights, self._fused.get(i)
        if kept is None:
            names = [f"layers.{i}.{part}" for part in ("qkv", "o", "gate_up", "down")]
            kept = self._fused[i] = _Fused(names, [], None)
        # A prover may be given other rows of a matrix (LOAD): then it has another object.
        for name, weight in zip(kept.names, kept.weights or [None], strict=False):
            if get(name) is not weight:
                kept.weights = [get(n) for n in kept.names]
                kept.run = make(self._config, layer, kept.weights)
                break
        cache = self._caches[i]
        tables = cache.extend_all(ctx.batch.counts)
        a = cache.arrays
        out: F32 = kept.run(x, ctx.cos, ctx.sin, ctx.batch.runs, tables, a["k"], a["k_scale"], a["v"], claims)
        return out

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
                self._kernels.attention(x.q_i8[rows], x.q_scale[rows], a["k"], a["k_scale"], a["v"], table, entry.start)
            )
        if len(parts) == 1:
            o, row_sum = parts[0]
            return o, row_sum
        return np.concatenate([o for o, _ in parts]), np.concatenate([s for _, s in parts])

    def append(self, layer: int, seq_id: int, start: int, kv_heads: range, k_i8: I8, k_scale: F32, v_i8: I8) -> None:
        """Store a run's keys and values for some KV heads; those of a layer come in ascending order."""
        cache = self._caches[layer]
        if kv_heads.start == 0:
            cache.extend(seq_id, k_i8.shape[0])
        heads = slice(kv_heads.start, kv_heads.stop)
        cache.write(seq_id, start, heads, k=k_i8, k_scale=k_scale, v=v_i8)

    def attend(self, layer: int, seq_id: int, start: int, kv_heads: range, q_i8: I8, q_scale: F32) -> tuple[I64, I32]:
        """Attention of queries at positions start, start + 1, ... over keys that are in the cache, for some KV heads.

        Shapes: q (tokens, heads of `kv_heads`, d) -> O (tokens, heads, d), L (tokens, heads).
        """
        cache, group = self._caches[layer], self._config.num_heads // self._config.num_kv_heads
        a, parts = cache.head_arrays(), []
        for i, kv in enumerate(kv_heads):
            heads = slice(i * group, (i + 1) * group)
            q, scale = np.ascontiguousarray(q_i8[:, heads]), np.ascontiguousarray(q_scale[:, heads])
            table = cache.head_table(seq_id, kv)
            parts.append(self._kernels.attention(q, scale, a["k"], a["k_scale"], a["v"], table, start))
        return np.concatenate([o for o, _ in parts], axis=1), np.concatenate([s for _, s in parts], axis=1)

    def scores(self, layer: int, seq_id: int, q_i8: I8, keys: int, kv_heads: range | None = None) -> I32:
        """Exact q.k of queries with the first `keys` cached keys of a sequence.

        Shapes: q (tokens, heads of `kv_heads`, d) -> (heads, tokens, keys), whether a query sees a key or not.
        """
        cache = self._caches[layer]
        scores: I32 = self._kernels.attention_scores(
            np.ascontiguousarray(q_i8),
            cache.arrays["k"],
            cache.table(seq_id),
            keys,
            kv_heads or range(self._config.num_kv_heads),
        )
        return scores

    def gather(self, layer: int, seq_id: int, name: str) -> np.ndarray[Any, Any]:
        """Contiguous copy (keys, kv_heads, ...) of what the cache holds of a sequence."""
        return self._caches[layer].gather(seq_id, name)

    def pages(self, layer: int, seq_id: int) -> tuple[dict[str, np.ndarray[Any, Any]], npt.NDArray[np.int32]]:
        """The cache's arrays of a layer and the block table of a sequence in them."""
        return self._caches[layer].arrays, self._caches[layer].table(seq_id)

    def weighted_values(self, layer: int, seq_id: int, p_u16: npt.NDArray[np.uint16]) -> I64:
        """O = P V. Shapes: P (heads, tokens, keys) -> (tokens, heads, d)."""
        cache = self._caches[layer]
        o: I64 = self._kernels.weighted_values(p_u16, cache.arrays["v"], cache.table(seq_id))
        return o

    def length(self, seq_id: int) -> int:
        """Cached tokens of a sequence."""
        return self._caches[-1].length(seq_id)

    def layer_length(self, layer: int, seq_id: int) -> int:
        """Cached tokens of a sequence in one layer; layers differ in the middle of a step."""
        return self._caches[layer].length(seq_id)

    def free(self, seq_id: int) -> None:
        """Forget a sequence; its pages are zeroed."""
        for cache in self._caches:
            cache.free(seq_id)

    def nonzero_cache_bytes(self) -> int:
        """Bytes of all caches that are not zero: none once every sequence has been freed."""
        return sum(int(np.count_nonzero(a.view(np.uint8))) for c in self._caches for a in c.arrays.values())

    @property
    def caches(self) -> Sequence[PagedCache]:
        """One per layer."""
        return self._caches

    @property
    def cache_bytes(self) -> int:
        return sum(c.nbytes for c in self._caches)
