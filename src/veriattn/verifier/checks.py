"""The two operations of the forward pass as the verifier sees them: take a claim, check it, return the checked copy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from veriattn.errors import AttentionMismatch, FreivaldsMismatch
from veriattn.native import (
    attention_replay,
    attention_transfer,
    key_projection,
    linear_check,
    project_outputs,
    value_projection,
)
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry
from veriattn.spec.kv import PagedCache
from veriattn.spec.model import ModelConfig, ModelTensors
from veriattn.spec.reference import I8, I32, I64
from veriattn.verifier.keys import REPETITIONS, U64, KeySet
from veriattn.wire.channel import Channel
from veriattn.wire.messages import AttentionCheck, Kind

_LYING = "the prover is faulty or lying; nothing of this step was released"
_NO_SUMS: U64 = np.empty((0, 0, 0), np.uint64)


@dataclass
class CheckCounts:
    """What has been checked. Rows are (token, linear) and (token, head, layer); waiting is wall time in `recv`."""

    linear_rows: int = 0
    attention_rows: int = 0
    elementwise_replayed: int = 0
    receive_s: float = 0.0


class VerifiedCache:
    """The verifier's own keys and the secret projections of its own values, for all layers.

    Per key: k (int8, d), its scale, and g = v.w in F_p, twice. Values themselves are not kept: checking needs only g.
    For transferred scores, c = sum_j r_j k_j runs along per sequence.

    Trust: filled only from checked operands, so a stale, swapped or shifted entry on the prover's side shows as a mismatch.
    """

    def __init__(self, config: ModelConfig, keys: KeySet, track_scores: bool) -> None:
        self._config, self._keys, self._track = config, keys, track_scores
        fields: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {
            "k": (np.dtype(np.int8), (config.head_dim,)),
            "k_scale": (np.dtype(np.float32), ()),
            "g": (np.dtype(np.uint64), (REPETITIONS,)),
        }
        self._layers = [PagedCache(config.num_kv_heads, fields, 1 << 20) for _ in range(config.num_layers)]
        self._sums: list[dict[int, U64]] = [{} for _ in range(config.num_layers)]

    def append(self, layer: int, entry: BatchEntry, k_i8: I8, k_scale: npt.NDArray[np.float32], v_i8: I8) -> U64:
        """Store a run's keys and projected values. Returns c over the keys before the run, (kv_heads, 2, d)."""
        cache = self._layers[layer]
        cache.extend(entry.seq_id, entry.num_tokens)
        g = value_projection(v_i8, self._keys.attention(layer))
        cache.write(entry.seq_id, entry.start, k=k_i8, k_scale=k_scale, g=g)
        if not self._track:
            return _NO_SUMS
        sums = self._sums[layer].get(entry.seq_id)
        if sums is None:
            sums = np.zeros((self._config.num_kv_heads, REPETITIONS, self._config.head_dim), np.uint64)
            self._sums[layer][entry.seq_id] = sums
        before = sums.copy()
        key_projection(k_i8, self._keys.positions(entry.start + entry.num_tokens), entry.start, sums)
        return before

    def layer(self, layer: int) -> PagedCache:
        return self._layers[layer]

    def free(self, seq_id: int) -> None:
        for cache, sums in zip(self._layers, self._sums, strict=True):
            cache.free(seq_id)
            sums.pop(seq_id, None)

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self._layers) + sum(s.nbytes for layer in self._sums for s in layer.values())


class CheckedOperations:
    """`spec.forward.Operations` over a prover's claims. What is returned has been checked; the first mismatch raises.

    Trust: claims are adversarial and copied once into private memory; every other operand is the verifier's own.
    Soundness: verifier/keys.py; derivation in docs/soundness.md.
    """

    def __init__(
        self,
        tensors: ModelTensors,
        keys: KeySet,
        channel: Channel,
        attention_check: AttentionCheck,
        counts: CheckCounts,
    ) -> None:
        self._config = tensors.config
        self._shapes = tensors.config.linear_shapes()
        self._keys, self._channel, self._check, self.counts = keys, channel, attention_check, counts
        self.cache = VerifiedCache(tensors.config, keys, attention_check is AttentionCheck.TRANSFER)

    def _receive(self, out: npt.NDArray[np.generic]) -> None:
        t = time.monotonic()
        self._channel.recv(Kind.CLAIM, out.nbytes, out)
        self.counts.receive_s += time.monotonic() - t

    def linear(self, name: str, a_i8: I8) -> I32:
        """Check claimed == a @ W[name].T for every row.

        Shapes: a (tokens, in) -> (tokens, out). Bounds: |claimed - y| < 2**32 < p.
        Raises: FreivaldsMismatch naming the operation and the first wrong row; ProverFault and below.
        Source: docs/spec.md section 3; Freivalds 1977; preprocessed as in Slalom (Tramer and Boneh 2019).
        """
        claimed_i32 = np.empty((a_i8.shape[0], self._shapes[name][0]), np.int32)
        self._receive(claimed_i32)
        r, u = self._keys.linear(name)
        ok = linear_check(claimed_i32, r, a_i8, u)
        if not bool(np.all(ok)):
            row = int(np.argmin(ok))
            raise FreivaldsMismatch(
                f"{name}: the claimed product is wrong in row {row} of {len(ok)}",
                hint=_LYING,
            )
        self.counts.linear_rows += len(ok)
        return claimed_i32

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """Check O == P V for every token and head, with P and L from the verifier's own queries and keys.

        Replay recomputes scores; transfer takes claimed scores, checks them against sums of secretly weighted keys, and
        uses them. Shapes: returns O (tokens, heads, d), L (tokens, heads). Bounds: |O| < 2**39 is checked, so |error| < p.
        Raises: AttentionMismatch naming layer, sequence and position; ProverFault and below.
        Source: docs/spec.md section 6; design of the checks in docs/soundness.md.
        """
        c = self._config
        slices = batch.slices()
        before = [
            self.cache.append(layer, e, x.k_i8[rows], x.k_scale[rows], x.v_i8[rows])
            for e, rows in zip(batch.entries, slices, strict=True)
        ]
        expected, row_sums = [], []
        for entry, rows, c_before in zip(batch.entries, slices, before, strict=True):
            if self._check is AttentionCheck.TRANSFER:
                row_sum, pg = self._transfer(layer, entry, x, rows, c_before)
            else:
                row_sum, pg = self._replay(layer, entry, x, rows)
            expected.append(pg)
            row_sums.append(row_sum)
        claimed_i64 = np.empty((batch.num_tokens, c.num_heads, c.head_dim), np.int64)
        self._receive(claimed_i64)
        got, in_range = project_outputs(claimed_i64, self._keys.attention(layer))
        if not in_range:
            raise AttentionMismatch(f"layers.{layer}.attention: a claimed output is 2**39 or larger", hint=_LYING)
        ok = np.all(got == np.concatenate(expected), axis=2)
        if not bool(np.all(ok)):
            row, head = (int(v) for v in np.argwhere(~ok)[0])
            where = self._where(layer, batch, row)
            raise AttentionMismatch(f"{where}, head {head}: the claimed output is wrong", hint=_LYING)
        self.counts.attention_rows += ok.size
        return claimed_i64, np.concatenate(row_sums)

    def _replay(self, layer: int, entry: BatchEntry, x: AttentionInput, rows: slice) -> tuple[I32, U64]:
        cache = self.cache.layer(layer)
        a = cache.arrays
        row_sum, pg = attention_replay(
            x.q_i8[rows], x.q_scale[rows], a["k"], a["k_scale"], a["g"], cache.table(entry.seq_id), entry.start
        )
        return row_sum, pg

    def _transfer(
        self, layer: int, entry: BatchEntry, x: AttentionInput, rows: slice, c_before: U64
    ) -> tuple[I32, U64]:
        n, start = entry.num_tokens, entry.start
        claimed_scores = np.empty((self._config.num_heads, n, start + n), np.int32)
        self._receive(claimed_scores)
        cache = self.cache.layer(layer)
        a = cache.arrays
        ok, row_sum, pg = attention_transfer(
            claimed_scores, x.q_i8[rows], x.q_scale[rows], x.k_i8[rows], c_before,
            self._keys.positions(start + n), a["k_scale"], a["g"], cache.table(entry.seq_id), start,
        )  # fmt: skip
        if not bool(np.all(ok)):
            row, head = (int(v) for v in np.argwhere(~ok.astype(bool))[0])
            raise AttentionMismatch(
                f"layers.{layer}.attention, sequence {entry.seq_id}, position {start + row}, head {head}: "
                "the claimed scores are wrong",
                hint=_LYING,
            )
        return row_sum, pg

    @staticmethod
    def _where(layer: int, batch: Batch, row: int) -> str:
        for entry, rows in zip(batch.entries, batch.slices(), strict=True):
            if rows.start <= row < rows.stop:
                position = entry.start + row - rows.start
                return f"layers.{layer}.attention, sequence {entry.seq_id}, position {position}"
        return f"layers.{layer}.attention, row {row}"

    def free(self, seq_id: int) -> None:
        self.cache.free(seq_id)

    def close(self) -> None:
        """Drop all state that depends on secrets."""
        for layer in range(self._config.num_layers):
            for seq_id in self.cache.layer(layer).sequences():
                self.cache.layer(layer).free(seq_id)
