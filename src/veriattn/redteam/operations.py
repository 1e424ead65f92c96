"""Lies in the computation itself: a backend that works with wrong operands and claims what comes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.native import kernels
from veriattn.prover.backend import ClaimSink
from veriattn.prover.cpu import CpuBackend
from veriattn.prover.split import SplitStep
from veriattn.redteam.attack import Array, Attack, apply_fault
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, check_batch, forward
from veriattn.spec.local import LocalOperations
from veriattn.spec.reference import F32, I8, I32, I64, attention_weights
from veriattn.wire.messages import AttentionCheck
from veriattn.wire.operations import LinearRequest, LoadRequest


class Lie:
    """The attack that is under way, and the report of what it did.

    A report line is JSON on standard output: `applied` says whether bytes that the verifier sees differ from honest ones.
    """

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.step = -1
        self.claim = ""

    def here(self, claim: str) -> bool:
        """Whether the attack is aimed at this claim of the current step. Where a claim travels in tiles, at all of them."""
        return self.step == self.attack.step and (claim + ".").startswith(self.attack.claim + ".")

    def report(self, applied: bool, **more: Any) -> None:
        """Tell the campaign before the bytes leave."""
        line = {"lie": self.attack.kind, "step": self.step, "claim": self.claim, "applied": applied, **more}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def report_change(self, claim: str, honest: Array, claimed: Array) -> None:
        """Report whether a claim was changed."""
        self.claim = claim
        self.report(not np.array_equal(honest, claimed))


class LyingKernels:
    """The native kernels, with rotary positions that are off by one for the last token of each run."""

    def __init__(self, backend: LyingBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(kernels, name)

    def qkv_epilogue(self, *args: Any) -> tuple[I8, F32, I8, F32, I8]:
        """Honest operands are returned; the wrong ones wait for `attention`."""
        backend, shifted = self._backend, list(args)
        last = [rows.stop - 1 for rows in backend.batch.slices()]
        positions = backend.batch.positions()
        positions[last] += 1
        shifted[4], shifted[5] = backend.tensors.rope_cos[positions], backend.tensors.rope_sin[positions]
        backend.wrong_operands = kernels.qkv_epilogue(*shifted)
        return kernels.qkv_epilogue(*args)


class LyingOperations:
    """Both operations with lies in between. A lie in a claim that is `consistent` is what the liar goes on with."""

    def __init__(self, backend: LyingBackend, lie: Lie, check: AttentionCheck, sink: ClaimSink) -> None:
        self._backend, self._lie, self._check, self._sink = backend, lie, check, sink
        self._local: LocalOperations = backend.operations

    def linear(self, name: str, a_i8: I8) -> I32:
        """Claims the product, of wrong weights where the attack says so."""
        y, attack, lie = self._local.linear(name, a_i8), self._lie.attack, self._lie
        if attack.kind == "wrong_weight" and name == attack.claim and lie.step >= attack.step:
            # Weight (row, column) is off by `value`: what a model with one changed weight would answer.
            row, column = attack.index % y.shape[1], attack.seed % a_i8.shape[1]
            before = y.copy()
            y[:, row] += a_i8[:, column].astype(np.int32) * np.int32(attack.value)
            lie.report_change(name, before, y)
        elif attack.kind == "wrong_input" and lie.here(name):
            honest, y = y, self._local.linear(name, apply_fault(a_i8, attack))
            lie.report_change(name, honest, y)
        self._sink.claim(name, y)
        return y

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """Claims scores (transfer) and outputs, of wrong operands where the attack says so."""
        o, row_sum = self._local.attention(layer, batch, x)
        attack, lie, name = self._lie.attack, self._lie, f"layers.{layer}.attention"
        lying = LIES.get(attack.kind)
        if lying is not None and lie.here(name):
            right, o = o, lying(self, layer, batch, x, o)
            lie.report_change(name, right, o)
        if self._check is AttentionCheck.TRANSFER:
            for entry, rows in zip(batch.entries, batch.slices(), strict=True):
                claim = f"layers.{layer}.scores.{entry.seq_id}"
                scores = self._local.scores(layer, entry.seq_id, x.q_i8[rows], entry.start + entry.num_tokens)
                if attack.kind == "scores" and lie.here(claim):
                    honest, scores = scores, apply_fault(scores, attack)
                    lie.report_change(claim, honest, scores)
                    o[rows] = self._from_scores(layer, entry, x, rows, scores)
                self._sink.claim(claim, scores)
        self._sink.claim(name, o)
        return o, row_sum

    # -- wrong operands of attention ---------------------------------------------------------------------------

    def _cache(self, layer: int) -> Any:
        return self._local._caches[layer]

    def _attend(self, layer: int, entry: BatchEntry, q_i8: I8, q_scale: F32, start: int) -> I64:
        cache = self._cache(layer)
        a, table = cache.arrays, cache.table(entry.seq_id)
        o, _ = kernels.attention(
            np.ascontiguousarray(q_i8), np.ascontiguousarray(q_scale), a["k"], a["k_scale"], a["v"], table, start
        )
        return o

    def _attend_all(self, layer: int, batch: Batch, q_i8: I8, q_scale: F32) -> I64:
        return np.concatenate(
            [
                self._attend(layer, e, q_i8[rows], q_scale[rows], e.start)
                for e, rows in zip(batch.entries, batch.slices(), strict=True)
            ]
        )

    def _from_scores(self, layer: int, entry: BatchEntry, x: AttentionInput, rows: slice, scores: I32) -> I64:
        """The output that follows from given scores: what a consistent liar claims."""
        cache = self._cache(layer)
        k_scale, v = cache.gather(entry.seq_id, "k_scale"), cache.gather(entry.seq_id, "v")
        heads, tokens, keys = scores.shape
        group = heads // v.shape[1]
        visible = np.arange(keys)[None, :] <= (entry.start + np.arange(tokens))[:, None]
        out = np.empty((tokens, heads, v.shape[2]), np.int64)
        for h in range(heads):
            p, _ = attention_weights(scores[h], x.q_scale[rows][:, h], k_scale[:, h // group], visible)
            out[:, h] = p.astype(np.int64) @ v[:, h // group].astype(np.int64)
        return out

    @contextmanager
    def _changed_cache(self, layer: int, seq_id: int, position: int, **values: Array) -> Iterator[None]:
        """Cache entries replaced for a while."""
        cache = self._cache(layer)
        saved = {name: cache.gather(seq_id, name)[position : position + 1].copy() for name in values}
        cache.write(seq_id, position, **values)
        try:
            yield
        finally:
            cache.write(seq_id, position, **saved)

    def sees_future(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """Each row but a run's last sees one key too many."""
        o = o.copy()
        for e, rows in zip(batch.entries, batch.slices(), strict=True):
            for i in range(e.num_tokens - 1):
                at = slice(rows.start + i, rows.start + i + 1)
                o[at] = self._attend(layer, e, x.q_i8[at], x.q_scale[at], e.start + i + 1)
        return o

    def misses_key(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """Rows do not see their own key."""
        o = o.copy()
        for e, rows in zip(batch.entries, batch.slices(), strict=True):
            for i in range(e.num_tokens):
                if e.start + i > 0:
                    at = slice(rows.start + i, rows.start + i + 1)
                    o[at] = self._attend(layer, e, x.q_i8[at], x.q_scale[at], e.start + i - 1)
        return o

    def wrong_group(self, layer: int, batch: Batch, x: AttentionInput, _: I64) -> I64:
        """Query heads attend over the keys of another KV head."""
        group = x.q_i8.shape[1] // x.k_i8.shape[1]
        o = self._attend_all(layer, batch, np.roll(x.q_i8, group, axis=1), np.roll(x.q_scale, group, axis=1))
        return np.roll(o, -group, axis=1)

    def stale_entry(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """The newest key and value of the first sequence were never written: those before are still there."""
        e = batch.entries[0]
        position = e.start + e.num_tokens - 1
        cache = self._cache(layer)
        old = {n: cache.gather(e.seq_id, n)[position - 1 : position].copy() for n in ("k", "k_scale", "v")}
        with self._changed_cache(layer, e.seq_id, position, **old):
            return self._attend_all(layer, batch, x.q_i8, x.q_scale)

    def _corrupt(self, field: str, layer: int, batch: Batch, x: AttentionInput) -> I64:
        e = batch.entries[0]
        position = self._lie.attack.index % (e.start + e.num_tokens)
        entry = self._cache(layer).gather(e.seq_id, field)[position : position + 1].copy()
        changed = apply_fault(entry, replace(self._lie.attack, fault="negate"))
        with self._changed_cache(layer, e.seq_id, position, **{field: changed}):
            return self._attend_all(layer, batch, x.q_i8, x.q_scale)

    def corrupt_key(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """A cached key turns bad after the fact."""
        return self._corrupt("k", layer, batch, x)

    def corrupt_value(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """A cached value turns bad after the fact."""
        return self._corrupt("v", layer, batch, x)

    def wrong_position(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """The last token of each run is rotated by one position too many, as query and as key."""
        if self._backend.wrong_operands is None:
            return o
        q, q_scale, k, k_scale, _ = self._backend.wrong_operands
        parts = []
        for e, rows in zip(batch.entries, batch.slices(), strict=True):
            last = slice(rows.stop - 1, rows.stop)
            position = e.start + e.num_tokens - 1
            with self._changed_cache(layer, e.seq_id, position, k=k[last], k_scale=k_scale[last]):
                parts.append(self._attend(layer, e, q[rows], q_scale[rows], e.start))
        return np.concatenate(parts)

    def other_sequence(self, layer: int, batch: Batch, x: AttentionInput, o: I64) -> I64:
        """The first sequence's queries attend over the second one's cache."""
        first, second = batch.entries[0], batch.entries[1]
        rows = batch.slices()[0]
        o = o.copy()
        o[rows] = self._attend(layer, second, x.q_i8[rows], x.q_scale[rows], first.start)
        return o


LIES: dict[str, Callable[[LyingOperations, int, Batch, AttentionInput, I64], I64]] = {
    "sees_future": LyingOperations.sees_future,
    "misses_key": LyingOperations.misses_key,
    "wrong_group": LyingOperations.wrong_group,
    "stale_entry": LyingOperations.stale_entry,
    "corrupt_key": LyingOperations.corrupt_key,
    "corrupt_value": LyingOperations.corrupt_value,
    "wrong_position": LyingOperations.wrong_position,
    "other_sequence": LyingOperations.other_sequence,
}


class LyingBackend(CpuBackend):
    """`CpuBackend` with the attack's lies in it."""

    lie: Lie
    batch: Batch
    wrong_operands: tuple[I8, F32, I8, F32, I8] | None = None
    _last_linear = -1
    _ignored = False

    @classmethod
    def load(cls, directory: Path, digest: str | None, kv_tokens: int, max_sequences: int) -> LyingBackend:
        """Weights without a lie yet; `lie` must be set before the first step."""
        return cls(
            directory,
            expected_digest=digest,  # type: ignore[arg-type]
            kv_tokens=kv_tokens,
            max_sequences=max_sequences,
        )

    def step(self, batch: Batch, check: AttentionCheck, sink: ClaimSink | None, split: SplitStep | None = None) -> F32:
        """See `Backend.step`. Shared sequences are computed honestly; their claims can still be tampered with."""
        lie = self.lie
        lie.step += 1
        attack = lie.attack
        if attack.kind == "other_token" and lie.step == attack.step:
            batch = self._other_token(batch)
        self.batch = batch
        if sink is None or split is not None:
            return super().step(batch, check, sink, split)
        check_batch(self.tensors, batch, [self.length(e.seq_id) for e in batch.entries])
        ops = LyingOperations(self, lie, check, sink)
        used: Any = LyingKernels(self) if attack.kind == "wrong_position" else kernels
        return forward(self.tensors, batch, ops, used)

    def linear(self, request: LinearRequest, sink: ClaimSink) -> None:
        """See `Backend.linear`; linears of a step ascend, however many tiles they come in, and some may stay in the TEE."""
        if self._last_linear < 0 or request.index < self._last_linear:
            self.lie.step += 1
        self._last_linear = request.index
        super().linear(request, sink)

    def load_rows(self, request: LoadRequest) -> None:
        """See `Backend.load_rows`. Who ignores them works with the model's own rows."""
        if self.lie.attack.kind != "ignore_load":
            super().load_rows(request)
        elif not self._ignored:
            self._ignored = True
            self.lie.report(True)

    def _other_token(self, batch: Batch) -> Batch:
        """Valid work for another prompt."""
        first, *others = batch.entries
        ids = list(first.token_ids)
        at = self.lie.attack.index % len(ids)
        ids[at] = (ids[at] + 1) % self.tensors.config.vocab_size
        self.lie.claim = "layers.0.qkv"
        self.lie.report(
            not np.array_equal(self.tensors.embed_f16[ids[at]], self.tensors.embed_f16[first.token_ids[at]])
        )
        return Batch((replace(first, token_ids=tuple(ids)), *others))
