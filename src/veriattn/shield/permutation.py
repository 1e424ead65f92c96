"""Secret permutations of head dimensions, and where they go on and come off.

Source: KV-Shield (arXiv 2409.04040), made right for several heads and rotary embedding: a permutation stays within a head, is
shared by the query heads of a KV head (else q.k changes), and goes on *after* the rotary step, which runs in the TEE. Scores
do not change, values come back permuted, so tokens are the same bits and every check works on restored claims.

What it does not do is in docs/kv-shield.md: it scrambles a leaked cache, it is not encryption.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from veriattn.errors import InternalError
from veriattn.spec.forward import AttentionInput, Batch
from veriattn.spec.model import ModelConfig
from veriattn.spec.reference import I8, I32, I64

ShieldMode = Literal["off", "static", "session"]
Index = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]


def random_permutation(size: int) -> Index:
    """A uniform permutation other than the identity, from the OS CSPRNG (Fisher-Yates)."""
    order = np.arange(size, dtype=np.int64)
    while size > 1:
        for i in range(size - 1, 0, -1):
            j = secrets.randbelow(i + 1)
            order[i], order[j] = order[j], order[i]
        if not np.array_equal(order, np.arange(size)):
            break
    return order


def random_signs(size: int) -> Signs:
    """Uniform +1 and -1 from the OS CSPRNG."""
    bits = np.unpackbits(np.frombuffer(secrets.token_bytes((size + 7) // 8), np.uint8))[:size]
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


class HeadPermutation:
    """x[..., head, i] -> sign[head, i] * x[..., head, order[head, i]], one row per KV head. Shapes: (kv_heads, d).

    Heads of a group share their KV head's row. Flat indices are made once per number of heads, as this runs per token.
    """

    def __init__(self, order: Index, sign: Signs | None = None) -> None:
        self.order, self.sign = order, sign
        self._flat: dict[tuple[int, int, int], tuple[Index, Index, Signs | None]] = {}

    @classmethod
    def draw(cls, kv_heads: int, head_dim: int, *, signed: bool) -> HeadPermutation:
        """Fresh secrets; without `signed` all signs are +1."""
        order = np.stack([random_permutation(head_dim) for _ in range(kv_heads)])
        return cls(order, np.stack([random_signs(head_dim) for _ in range(kv_heads)]) if signed else None)

    def __repr__(self) -> str:
        return "HeadPermutation(secret)"

    def apply(self, x_i8: I8) -> I8:
        """Permute (tokens, heads, d), heads a multiple of the KV heads."""
        tokens, heads, d = x_i8.shape
        index, _, sign = self._indices(0, self.order.shape[0], heads // self.order.shape[0])
        shown = x_i8.reshape(tokens, heads * d).take(index, axis=1)
        if sign is not None:
            shown *= sign
        return shown.reshape(x_i8.shape)

    def restore(self, y_i64: I64, first_kv_head: int = 0, group: int = 1) -> I64:
        """Undo `apply` on claims (tokens, heads, d) of the heads of some KV heads from the given one on."""
        tokens, heads, d = y_i64.shape
        _, inverse, sign = self._indices(first_kv_head, heads // group, group)
        flat = y_i64.reshape(tokens, heads * d)
        if sign is not None:
            flat = flat * sign
        return flat.take(inverse, axis=1).reshape(y_i64.shape)

    def _indices(self, first: int, count: int, group: int) -> tuple[Index, Index, Signs | None]:
        """Flat gather index, its inverse, and signs in permuted order, for the heads of `count` KV heads from `first` on."""
        known = self._flat.get((first, count, group))
        if known is None:
            rows = slice(first, first + count)
            order = np.repeat(self.order[rows], group, axis=0)
            index = (np.arange(order.shape[0])[:, None] * order.shape[1] + order).reshape(-1)
            sign = None if self.sign is None else np.repeat(self.sign[rows], group, axis=0).reshape(-1)
            known = self._flat[first, count, group] = (index, np.argsort(index), sign)
        return known

    def destroy(self) -> None:
        """Overwrite the secrets."""
        self.order[...] = 0
        if self.sign is not None:
            self.sign[...] = 0
        for arrays in self._flat.values():
            for array in arrays:
                if array is not None:
                    array[...] = 0
        self._flat.clear()


@dataclass
class LayerShield:
    """The two permutations of a layer: one for q and k, another for v."""

    qk: HeadPermutation
    v: HeadPermutation

    @classmethod
    def draw(cls, config: ModelConfig, *, signed: bool) -> LayerShield:
        def fresh() -> HeadPermutation:
            return HeadPermutation.draw(config.num_kv_heads, config.head_dim, signed=signed)

        return cls(fresh(), fresh())

    def destroy(self) -> None:
        self.qk.destroy()
        self.v.destroy()


class Shield:
    """All permutations of one session.

    `static`: one pair per layer, also applied to the rows of the q, k and v projections that the prover gets. `session`: the
    projections as in `static`, and fresh signed permutations per sequence and layer for what the cache holds.

    Trust: drawn in the TEE, never sent, never printed; those of a sequence are overwritten when it ends.
    """

    def __init__(self, config: ModelConfig, mode: ShieldMode) -> None:
        if mode == "off":
            raise InternalError("a shield that is off")
        self.mode = mode
        self._config = config
        self._static = [LayerShield.draw(config, signed=False) for _ in range(config.num_layers)]
        self._sequences: dict[int, list[LayerShield]] = {}
        self._inverse_rows = [np.argsort(self.row_order(layer)) for layer in range(config.num_layers)]

    def __repr__(self) -> str:
        return f"Shield({self.mode})"

    def row_order(self, layer: int) -> Index:
        """Rows of the qkv projection as the prover gets them: row i of its matrix is row order[i] of the model's."""
        c, shield = self._config, self._static[layer]
        group = c.num_heads // c.num_kv_heads
        orders = np.concatenate([np.repeat(shield.qk.order, group, axis=0), shield.qk.order, shield.v.order])
        first = np.arange(orders.shape[0], dtype=np.int64)[:, None] * c.head_dim
        flat: Index = (first + orders).reshape(-1)
        return flat

    def restore_projection(self, layer: int, claimed_i32: I32) -> I32:
        """The claimed qkv accumulators in the model's order, (tokens, qkv size)."""
        restored: I32 = claimed_i32.take(self._inverse_rows[layer], axis=1)
        return restored

    def layer(self, layer: int, seq_id: int) -> LayerShield:
        """The permutations of a sequence's cache entries in a layer."""
        if self.mode == "static":
            return self._static[layer]
        if seq_id not in self._sequences:
            self._sequences[seq_id] = [
                LayerShield.draw(self._config, signed=True) for _ in range(self._config.num_layers)
            ]
        return self._sequences[seq_id][layer]

    def apply(self, layer: int, batch: Batch, x: AttentionInput) -> AttentionInput:
        """Operands as the prover may see them."""
        if self.mode == "static":
            shield = self._static[layer]
            return AttentionInput(
                shield.qk.apply(x.q_i8), x.q_scale, shield.qk.apply(x.k_i8), x.k_scale, shield.v.apply(x.v_i8)
            )
        q, k, v = (np.empty_like(a) for a in (x.q_i8, x.k_i8, x.v_i8))
        for entry, rows in zip(batch.entries, batch.slices(), strict=True):
            shield = self.layer(layer, entry.seq_id)
            q[rows], k[rows] = shield.qk.apply(x.q_i8[rows]), shield.qk.apply(x.k_i8[rows])
            v[rows] = shield.v.apply(x.v_i8[rows])
        return AttentionInput(q, x.q_scale, k, x.k_scale, v)

    def restore_outputs(self, layer: int, seq_id: int, claimed_i64: I64, first_kv_head: int = 0) -> I64:
        """Claimed outputs in the model's order. Shapes: (tokens, heads of some KV heads, d)."""
        group = self._config.num_heads // self._config.num_kv_heads
        return self.layer(layer, seq_id).v.restore(claimed_i64, first_kv_head, group)

    def free(self, seq_id: int) -> None:
        """Overwrite a sequence's permutations."""
        for layer in self._sequences.pop(seq_id, []):
            layer.destroy()

    def destroy(self) -> None:
        """Overwrite everything."""
        for seq_id in list(self._sequences):
            self.free(seq_id)
        for layer in self._static:
            layer.destroy()
        for inverse in self._inverse_rows:
            inverse[...] = 0
