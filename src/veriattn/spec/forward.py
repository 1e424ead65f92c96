"""The forward pass, written once, over two operations that a strategy supplies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np

from veriattn.errors import InternalError
from veriattn.spec import reference
from veriattn.spec.model import LayerTensors, ModelTensors
from veriattn.spec.reference import F32, I8, I32, I64

LogitRows = Literal["none", "last", "all"]

#: Tokens up to which a layer is worth doing in one call: with more, operations take long enough by themselves, and a
#: prover's claims should leave one by one.
FUSED_ROWS = 64


@dataclass(frozen=True)
class BatchEntry:
    """A run of new tokens of one sequence: token_ids sit at positions start, start + 1, ..."""

    seq_id: int
    start: int
    token_ids: tuple[int, ...]
    logits: LogitRows = "last"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def part(self, at: int, count: int) -> BatchEntry:
        """`count` of the run's tokens, from the one at index `at` on."""
        return BatchEntry(self.seq_id, self.start + at, self.token_ids[at : at + count], self.logits)


@dataclass(frozen=True)
class Batch:
    """One step of the model over several sequences, flattened in the order of the entries."""

    entries: tuple[BatchEntry, ...]

    def __post_init__(self) -> None:
        ids = [e.seq_id for e in self.entries]
        if not ids or len(set(ids)) != len(ids) or any(e.num_tokens == 0 or e.start < 0 for e in self.entries):
            raise InternalError("a batch needs distinct sequences with at least one token each")

    @property
    def num_tokens(self) -> int:
        return sum(e.num_tokens for e in self.entries)

    def slices(self) -> list[slice]:
        """Rows of each entry in the flattened token axis."""
        out, at = [], 0
        for e in self.entries:
            out.append(slice(at, at + e.num_tokens))
            at += e.num_tokens
        return out

    @cached_property
    def runs(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(entries, 2): start and number of tokens of each entry."""
        return np.array([(e.start, e.num_tokens) for e in self.entries], dtype=np.int64)

    @cached_property
    def counts(self) -> list[tuple[int, int]]:
        """Sequence and number of tokens of each entry."""
        return [(e.seq_id, e.num_tokens) for e in self.entries]

    def token_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Token ids of all rows, entry after entry."""
        return np.array([t for e in self.entries for t in e.token_ids], dtype=np.int32)

    def positions(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Position of each row in its own sequence."""
        return np.concatenate([np.arange(e.start, e.start + e.num_tokens) for e in self.entries])

    def without(self, seq_ids: frozenset[int]) -> tuple[Batch | None, list[int]]:
        """The batch less some sequences (None if nothing is left), and which rows of this one it has."""
        kept = tuple(e for e in self.entries if e.seq_id not in seq_ids)
        slices = zip(self.entries, self.slices(), strict=True)
        rows = [i for e, s in slices if e.seq_id not in seq_ids for i in range(s.start, s.stop)]
        return (Batch(kept) if kept else None), rows

    def then(self, other: Batch) -> Batch:
        """This batch and the next one as one: runs of the same sequence follow each other."""
        runs = {e.seq_id: e for e in self.entries}
        for e in other.entries:
            first = runs.get(e.seq_id)
            runs[e.seq_id] = (
                e if first is None else BatchEntry(e.seq_id, first.start, first.token_ids + e.token_ids, e.logits)
            )
        return Batch(tuple(runs.values()))

    def logit_rows(self) -> list[int]:
        """Rows of the flattened token axis whose logits are asked for, in order."""
        rows: list[int] = []
        for e, s in zip(self.entries, self.slices(), strict=True):
            if e.logits == "all":
                rows.extend(range(s.start, s.stop))
            elif e.logits == "last":
                rows.append(s.stop - 1)
        return rows

    def owners(self, rows: Iterable[int], *, of_logits: bool) -> frozenset[int]:
        """Ids of the sequences that these rows belong to: rows of the flattened token axis, or of the logits."""
        ids = [e.seq_id for e in self.entries for _ in e.token_ids]
        if of_logits:
            ids = [ids[row] for row in self.logit_rows()]
        return frozenset(ids[row] for row in rows)


@dataclass(frozen=True)
class AttentionInput:
    """int8 operands of one layer's attention for all tokens of a batch; shapes as returned by `qkv_epilogue`."""

    q_i8: I8
    q_scale: F32
    k_i8: I8
    k_scale: F32
    v_i8: I8


class Operations(Protocol):
    """What a strategy supplies. Whatever these return is used: they verify, or they compute."""

    def linear(self, name: str, a_i8: I8) -> I32:
        """Exact a @ W[name].T. Shapes: (tokens, in) -> (tokens, out)."""
        ...

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """Append k and v to each sequence's cache, attend causally. Returns O (tokens, heads, d) and L (tokens, heads)."""
        ...


class FusedOperations(Operations, Protocol):
    """Operations that may also do a layer as a whole, with the bits and the errors of `run_layer`'s own way."""

    def fused_layer(self, ctx: StepContext, i: int, layer: LayerTensors, x: F32) -> F32 | None:
        """See `run_layer`. None where this layer of this step is to be done operation by operation."""
        ...


@dataclass(frozen=True)
class StepContext:
    """What every layer of one step shares."""

    model: ModelTensors
    batch: Batch
    cos: F32
    sin: F32
    ops: Operations
    kernels: ModuleType


def start_step(
    model: ModelTensors, batch: Batch, ops: Operations, kernels: ModuleType = reference
) -> tuple[StepContext, F32]:
    """Gather rotary rows and embeddings. Returns the context and the residual stream (tokens, hidden)."""
    positions = batch.positions()
    ctx = StepContext(model, batch, model.rope_cos[positions], model.rope_sin[positions], ops, kernels)
    return ctx, model.embed_f16[batch.token_ids()].astype(np.float32)


def run_layer(ctx: StepContext, i: int, layer: LayerTensors, x: F32) -> F32:
    """One decoder layer on the residual stream. Shapes: (tokens, hidden) -> (tokens, hidden)."""
    fused = getattr(ctx.ops, "fused_layer", None)
    if fused is not None and x.shape[0] <= FUSED_ROWS:
        whole: F32 | None = fused(ctx, i, layer, x)
        if whole is not None:
            return whole
    c, k, ops, eps = ctx.model.config, ctx.kernels, ctx.ops, ctx.model.eps
    a, a_scale = k.norm_quantise(x, eps)
    y = ops.linear(f"layers.{i}.qkv", a)
    qkv = k.qkv_epilogue(
        y, a_scale, layer.qkv_scale, layer.qkv_bias, ctx.cos, ctx.sin, layer.v_scale,
        c.num_heads, c.num_kv_heads, c.head_dim, layer.k_center, layer.q_norm, layer.k_norm, eps,
    )  # fmt: skip
    o, row_sum = ops.attention(i, ctx.batch, AttentionInput(*qkv))
    a, a_scale = k.attention_epilogue(o, row_sum, layer.v_scale)
    y = ops.linear(f"layers.{i}.o", a)
    x = k.residual_add(x, y, a_scale, layer.o_scale)
    a, a_scale = k.norm_quantise(x, eps)
    y = ops.linear(f"layers.{i}.gate_up", a)
    a, a_scale = k.mlp_epilogue(y, a_scale, layer.gate_up_scale)
    y = ops.linear(f"layers.{i}.down", a)
    result: F32 = k.residual_add(x, y, a_scale, layer.down_scale)
    return result


def finish_step(ctx: StepContext, x: F32) -> F32:
    """Final norm and lm_head for the rows asked for. Returns logits (rows, vocab)."""
    rows = ctx.batch.logit_rows()
    if not rows:
        return np.empty((0, ctx.model.config.vocab_size), np.float32)
    a, a_scale = ctx.kernels.norm_quantise(np.ascontiguousarray(x[rows]), ctx.model.eps)
    result: F32 = ctx.kernels.logits(ctx.ops.linear("lm_head", a), a_scale, ctx.model.lm_head_scale)
    return result


def forward(model: ModelTensors, batch: Batch, ops: Operations, kernels: ModuleType = reference) -> F32:
    """Run one step. Returns float32 logits for `batch.logit_rows()`, shape (rows, vocab).

    Rows do not depend on each other but through the sequences' caches, and nothing depends on the composition of the
    batch or on how a sequence is cut into steps. `kernels` is `spec.reference` or a module with the same functions
    and the same bits.

    Raises: NumericsError outside the domain of the canonical function; whatever `ops` raises.
    """
    ctx, x = start_step(model, batch, ops, kernels)
    for i, layer in enumerate(model.layers):
        x = run_layer(ctx, i, layer, x)
    return finish_step(ctx, x)


def check_batch(model: ModelTensors, batch: Batch, lengths: Sequence[int]) -> None:
    """Refuse a batch that the model cannot run; `lengths` are the cached tokens of each entry's sequence.

    Raises: InternalError; callers validate user input before they build a batch.
    """
    c = model.config
    for e, n in zip(batch.entries, lengths, strict=True):
        if e.start != n or e.start + e.num_tokens > c.max_positions:
            raise InternalError(f"sequence {e.seq_id}: tokens at {e.start} do not continue {n} cached tokens")
        if min(e.token_ids) < 0 or max(e.token_ids) >= c.vocab_size:
            raise InternalError(f"sequence {e.seq_id}: a token id is outside the vocabulary")
