"""Secret permutations of head dimensions, and where they go on and come off.

Source: KV-Shield (arXiv 2409.04040), made right for several heads and rotary embedding: a permutation stays within a head, is
shared by the query heads of a KV head (else q.k changes), and goes on *after* the rotary step, which runs in the TEE. Scores
do not change, values come back permuted, so tokens are the same bits and every check works on restored claims.

What it does not do is in docs/kv-shield.md: it scrambles a leaked cache, it is not encryption.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(frozen=True, slots=True)
class _Gather:
    """A flat index over (heads, d), the same seen as (1, heads, d), and signs to multiply with afterwards."""

    index: Index
    one: Index
    sign: npt.NDArray[np.signedinteger[Any]] | None
    group: int

    def take(self, x: Any) -> Any:
        """Shapes: (tokens, heads, d) -> the same, fresh. A single token, as in decoding, is one gather."""
        if x.shape[0] == 1:
            return x.take(self.one)
        return x.reshape(x.shape[0], -1).take(self.index, axis=1).reshape(x.shape)

    def __repr__(self) -> str:
        return "_Gather(secret)"


class HeadPermutation:
    """x[..., head, i] -> sign[head, i] * x[..., head, order[head, i]], one row per KV head. Shapes: (kv_heads, d).

    Heads of a group share their KV head's row. Flat indices are made once per number of heads, as this runs per token.
    """

    def __init__(self, order: Index, sign: Signs | None = None) -> None:
        self.order, self.sign = order, sign
        self._gathers: dict[tuple[int, int], _Gather] = {}

    @classmethod
    def draw(cls, kv_heads: int, head_dim: int, *, signed: bool) -> HeadPermutation:
        """Fresh secrets; without `signed` all signs are +1."""
        order = np.stack([random_permutation(head_dim) for _ in range(kv_heads)])
        return cls(order, np.stack([random_signs(head_dim) for _ in range(kv_heads)]) if signed else None)

    def __repr__(self) -> str:
        return "HeadPermutation(secret)"

    def apply(self, x_i8: I8) -> I8:
        """Permute (tokens, heads, d), heads a multiple of the KV heads."""
        known = self._gathers.get((-1, x_i8.shape[1]))
        shown: I8 = (known or self._gather(-1, x_i8.shape[1], x_i8.shape[1] // self.order.shape[0])).take(x_i8)
        if self.sign is not None:
            shown *= self._signs(x_i8.shape[1])
        return shown

    def apply_by_head(self, x_i8: I8) -> I8:
        """Permute (kv_heads, tokens, d), as pages of a cache have it."""
        return np.ascontiguousarray(self.apply(np.ascontiguousarray(x_i8.swapaxes(0, 1))).swapaxes(0, 1))

    def restore(self, y_i64: I64, first_kv_head: int = 0, group: int = 1) -> I64:
        """Undo `apply` on claims (tokens, heads, d) of the heads of some KV heads from the given one on."""
        heads = y_i64.shape[1]
        known = self._gathers.get((first_kv_head, heads))
        gather = known if known is not None and known.group == group else self._gather(first_kv_head, heads, group)
        restored: I64 = gather.take(y_i64)
        if gather.sign is not None:
            restored *= gather.sign
        return restored

    def _signs(self, heads: int) -> npt.NDArray[np.signedinteger[Any]]:
        sign = self._gathers[-1, heads].sign
        if sign is None:
            raise InternalError("a permutation without signs")
        return sign

    def _gather(self, first: int, heads: int, group: int) -> _Gather:
        """Forward gather of all heads (first = -1), or the inverse one of the heads of some KV heads; kept for next time."""
        start = max(first, 0)
        rows = slice(start, start + heads // group)
        order = np.repeat(self.order[rows], group, axis=0)
        forward = (np.arange(heads)[:, None] * order.shape[1] + order).reshape(-1)
        index = forward if first < 0 else np.argsort(forward)
        sign: npt.NDArray[np.signedinteger[Any]] | None = None
        if self.sign is not None:
            sign = np.repeat(self.sign[rows], group, axis=0).reshape(-1)
        if sign is not None and first >= 0:
            sign = sign[index].astype(np.int64)  # as what it is multiplied with
        shape = (1, heads, order.shape[1])
        made = _Gather(index, index.reshape(shape), None if sign is None else sign.reshape(shape), group)
        self._gathers[first, heads] = made
        return made

    def destroy(self) -> None:
        """Overwrite the secrets."""
        self.order[...] = 0
        if self.sign is not None:
            self.sign[...] = 0
        for gather in self._gathers.values():
            gather.index[...] = 0
            if gather.sign is not None:
                gather.sign[...] = 0
        self._gathers.clear()


@dataclass
class LayerShield:
    """The two permutations of a layer: one for q and k, another for v."""

    qk: HeadPermutation
    v: HeadPermutation

    @classmethod
    def draw(cls, config: ModelConfig, *, signed: bool) -> LayerShield:
        """Fresh secrets for a layer, those of v apart from those of q and k."""

        def fresh() -> HeadPermutation:
            return HeadPermutation.draw(config.num_kv_heads, config.head_dim, signed=signed)

        return cls(fresh(), fresh())

    def destroy(self) -> None:
        """Overwrite the secrets."""
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
        if self.mode == "static" or len(batch.entries) == 1:
            shield = self.layer(layer, batch.entries[0].seq_id)
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
