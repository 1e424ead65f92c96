"""Checks of the two operations of the forward pass, and the flow of claims under `run-ahead`."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from veriattn.errors import AttentionMismatch, FreivaldsMismatch, VeriattnError
from veriattn.native import (
    attention_replay,
    attention_transfer,
    key_projection,
    linear_check,
    project_outputs,
    value_projection,
)
from veriattn.native.kernels import out_of_domain
from veriattn.native.layers import CheckedLayer, Claims, Finding, claim_buffers
from veriattn.spec.field import U8, P
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, StepContext
from veriattn.spec.kv import PagedCache
from veriattn.spec.model import LayerTensors, ModelConfig
from veriattn.spec.reference import F32, I8, I32, I64
from veriattn.trace import NO_TRACE, Trace
from veriattn.verifier.keys import REPETITIONS, U64, KeySet
from veriattn.wire.channel import Channel
from veriattn.wire.messages import AttentionCheck, Kind

#: What to tell the user about any mismatch.
LYING = "the prover is faulty or lying; nothing of this step was released"
_Integer = TypeVar("_Integer", np.int32, np.int64)
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

    def append(self, layer: int, entry: BatchEntry, k_i8: I8, k_scale: npt.NDArray[np.float32], g: U64) -> U64:
        """Store a run's keys and values, these projected to g = v.w (tokens, kv_heads, 2).

        Returns c over the keys before the run, (kv_heads, 2, d).
        """
        cache = self._layers[layer]
        cache.extend(entry.seq_id, entry.num_tokens)
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

    @property
    def tracks_scores(self) -> bool:
        """Whether challenge sums are kept."""
        return self._track

    def challenge_sum(self, layer: int, seq_id: int) -> U64:
        """sum_j r_j k_j over all keys here, (kv_heads, 2, d)."""
        sums = self._sums[layer].get(seq_id)
        if sums is None:
            return np.zeros((self._config.num_kv_heads, REPETITIONS, self._config.head_dim), np.uint64)
        return sums

    def layer(self, layer: int) -> PagedCache:
        """Keys, scales and projected values of a layer."""
        return self._layers[layer]

    @property
    def layers(self) -> Sequence[PagedCache]:
        return self._layers

    def sum_bytes(self, seq_ids: Sequence[int] = ()) -> int:
        """Memory of the challenge sums, with those of these sequences."""
        if not self._track:
            return 0
        c = self._config
        live = set().union(seq_ids, *self._sums)
        return len(live) * c.num_layers * c.num_kv_heads * REPETITIONS * c.head_dim * 8

    def free(self, seq_id: int) -> None:
        """Forget a sequence; its challenge sums are overwritten."""
        for cache, sums in zip(self._layers, self._sums, strict=True):
            cache.free(seq_id)
            if seq_id in sums:
                sums.pop(seq_id)[...] = 0

    def close(self) -> None:
        """Overwrite and drop everything."""
        for seq_id in {s for layer in self._layers for s in layer.sequences()}:
            self.free(seq_id)

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self._layers) + self.sum_bytes()


def _part(x: np.ndarray[Any, Any], heads: slice) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x[:, heads])


def _join(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _wrong_product(name: str, ok: U8) -> FreivaldsMismatch:
    return FreivaldsMismatch(
        f"{name}: the claimed product is wrong in row {int(np.argmin(ok))} of {len(ok)}",
        hint=LYING,
        operation=name,
        rows=np.flatnonzero(np.asarray(ok) == 0).tolist(),
    )


def _output_too_large(layer: int, seq_id: int) -> AttentionMismatch:
    where = f"layers.{layer}.attention, sequence {seq_id}"
    return AttentionMismatch(f"{where}: a claimed output is 2**39 or larger", hint=LYING, sequences=[seq_id])


def _wrong_output(layer: int, seq_id: int, position: int, head: int) -> AttentionMismatch:
    where = f"layers.{layer}.attention, sequence {seq_id}, position {position}, head {head}"
    return AttentionMismatch(f"{where}: the claimed output is wrong", hint=LYING, sequences=[seq_id])


_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _timed(
    method: Callable[Concatenate[ClaimChecker, _Args], _Result],
) -> Callable[Concatenate[ClaimChecker, _Args], _Result]:
    """Record each call as a check while there is a trace."""

    def run(self: ClaimChecker, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with self.trace.span("check"):
            return method(self, *args, **kwargs)

    return functools.update_wrapper(run, method)


class ClaimChecker:
    """Checks claims against the session's keys and the verifier's own operands. Raises on the first mismatch.

    Trust: claims are adversarial, in private memory already; every other operand is the verifier's own.
    Soundness: verifier/keys.py; derivation in docs/soundness.md.
    """

    def __init__(
        self,
        config: ModelConfig,
        keys: KeySet,
        track_scores: bool,
        counts: CheckCounts,
        trace: Trace = NO_TRACE,
    ) -> None:
        self.config, self.keys, self.counts, self.trace = config, keys, counts, trace
        self.shapes = config.linear_shapes()
        self.cache = VerifiedCache(config, keys, track_scores)
        self.prime = np.uint64(P)
        self._group = config.num_heads // config.num_kv_heads
        parts = ("qkv", "o", "gate_up", "down")
        self._linears = [tuple(f"layers.{i}.{part}" for part in parts) for i in range(config.num_layers)]
        self._checked: dict[int, CheckedLayer] = {}

    @_timed
    def layer(self, ctx: StepContext, i: int, tensors: LayerTensors, x: F32, claims: Claims) -> F32:
        """Replay a layer over its claims, all of them checked as `linear`, `expected_by_replay` and `outputs` do it.

        Shapes: x (tokens, hidden) -> the same after the layer. Trust: claims lie in private memory.
        Raises: FreivaldsMismatch, AttentionMismatch naming what is wrong first; NumericsError.
        """
        w = self.keys.attention(i)  # refuses destroyed keys, which the layer below could not tell from others
        names = self._linears[i]
        checked = self._checked.get(i)
        if checked is None:
            checked = self._checked[i] = CheckedLayer(self.config, tensors, [self.keys.linear(n) for n in names], w)
        cache, batch = self.cache.layer(i), ctx.batch
        tables = cache.extend_all(batch.counts)
        a, rows = cache.arrays, x.shape[0]
        ok = np.ones(rows, np.uint8)
        out, found, row, head = checked.run(
            x, ctx.cos, ctx.sin, batch.runs, tables, a["k"], a["k_scale"], a["g"], claims, ok
        )
        if found is not Finding.RIGHT:
            raise self._fault(found, i, batch, ok, row, head)
        self.counts.linear_rows += len(names) * rows
        self.counts.attention_rows += rows * self.config.num_heads
        return out

    def _fault(self, found: Finding, layer: int, batch: Batch, ok: U8, row: int, head: int) -> VeriattnError:
        linears = (Finding.WRONG_QKV, Finding.WRONG_O, Finding.WRONG_GATE_UP, Finding.WRONG_DOWN)
        if found is Finding.OUT_OF_DOMAIN:
            return out_of_domain()
        if found in linears:
            return _wrong_product(self._linears[layer][linears.index(found)], ok)
        entry, first = next(
            (e, s.start) for e, s in zip(batch.entries, batch.slices(), strict=True) if s.start <= row < s.stop
        )
        if found is Finding.OUTPUT_TOO_LARGE:
            return _output_too_large(layer, entry.seq_id)
        return _wrong_output(layer, entry.seq_id, entry.start + row - first, head)

    @_timed
    def linear(self, name: str, a_i8: I8, claimed_i32: I32) -> I32:
        """Check claimed == a @ W[name].T for every row; returns the claim, verified.

        Shapes: a (tokens, in), claimed (tokens, out). Bounds: |claimed - y| < 2**32 < p.
        Raises: FreivaldsMismatch naming the operation and the first wrong row.
        Source: docs/spec.md section 3; Freivalds 1977; preprocessed as in Slalom (Tramer and Boneh 2019).
        """
        r, u = self.keys.linear(name)
        ok = linear_check(claimed_i32, r, a_i8, u)
        if not bool(np.all(ok)):
            raise _wrong_product(name, ok)
        self.counts.linear_rows += len(ok)
        return claimed_i32

    @_timed
    def append(self, layer: int, batch: Batch, x: AttentionInput) -> list[U64]:
        """Add the batch's keys and values to the verifier's cache; returns each entry's challenge sum before it."""
        g = value_projection(x.v_i8, self.keys.attention(layer))
        return [
            self.cache.append(layer, e, x.k_i8[rows], x.k_scale[rows], g[rows])
            for e, rows in zip(batch.entries, batch.slices(), strict=True)
        ]

    @_timed
    def expected_by_replay(
        self, layer: int, seq_id: int, start: int, q_i8: I8, q_scale: F32, kv_heads: range | None = None
    ) -> tuple[I32, U64]:
        """L and P.g of queries at positions start, start + 1, ... from the verifier's own scores.

        Shapes: q (tokens, heads of `kv_heads`, d) -> (tokens, heads), (tokens, heads, 2). Default: all KV heads.
        """
        parts = []
        for heads, a, table in self._views(layer, seq_id, kv_heads):
            parts.append(
                attention_replay(_part(q_i8, heads), _part(q_scale, heads), a["k"], a["k_scale"], a["g"], table, start)
            )
        return _join([p[0] for p in parts]), _join([p[1] for p in parts])

    @_timed
    def expected_by_transfer(
        self,
        layer: int,
        seq_id: int,
        start: int,
        q_i8: I8,
        q_scale: F32,
        k_i8: I8,
        before: U64,
        claimed_scores: I32,
        kv_heads: range | None = None,
    ) -> tuple[I32, U64]:
        """L and P.g from claimed scores, which are checked first.

        Shapes: q (tokens, heads, d), k (tokens, n, d): the keys of the same tokens, before (n, 2, d): challenge sum of the
        keys at positions < start, scores (heads, tokens, start + tokens); heads and n are those of `kv_heads`, default all.
        Bounds: |error| < 2**32 < p. Raises: AttentionMismatch.
        """
        parts = []
        for heads, a, table in self._views(layer, seq_id, kv_heads):
            kv = slice(None) if heads == slice(None) else slice(heads.start // self._group, heads.stop // self._group)
            ok, row_sum, pg = attention_transfer(
                claimed_scores[heads], _part(q_i8, heads), _part(q_scale, heads), _part(k_i8, kv),
                before[kv], self.keys.positions(start + q_i8.shape[0]), a["k_scale"], a["g"], table, start,
            )  # fmt: skip
            if not bool(np.all(ok)):
                row, head = (int(v) for v in np.argwhere(ok == 0)[0])
                head += (heads.start or 0) + (kv_heads.start if kv_heads else 0) * self._group
                where = f"layers.{layer}.attention, sequence {seq_id}, position {start + row}, head {head}"
                raise AttentionMismatch(f"{where}: the claimed scores are wrong", hint=LYING, sequences=[seq_id])
            parts.append((row_sum, pg))
        return _join([p[0] for p in parts]), _join([p[1] for p in parts])

    def _views(
        self, layer: int, seq_id: int, kv_heads: range | None
    ) -> Iterator[tuple[slice, dict[str, np.ndarray[Any, Any]], npt.NDArray[np.int32]]]:
        """Cache arrays and block tables that cover `kv_heads`, each with its heads relative to the first of them."""
        cache = self.cache.layer(layer)
        if kv_heads is None or len(kv_heads) == self.config.num_kv_heads:
            yield slice(None), cache.arrays, cache.table(seq_id)
            return
        arrays = cache.head_arrays()
        for i, kv in enumerate(kv_heads):
            yield slice(i * self._group, (i + 1) * self._group), arrays, cache.head_table(seq_id, kv)

    @_timed
    def outputs(
        self, layer: int, seq_id: int, start: int, claimed_i64: I64, expected: U64, first_kv_head: int = 0
    ) -> None:
        """Check O.w == P.g for every row and head.

        Shapes: claimed (tokens, heads of some KV heads, d), expected (tokens, the same heads, 2).
        Bounds: |O| < 2**39 is checked, so |error| < 2**40 < p. Raises: AttentionMismatch.
        """
        kv_heads = claimed_i64.shape[1] // self._group
        got, in_range = project_outputs(
            claimed_i64, self.keys.attention(layer)[first_kv_head : first_kv_head + kv_heads]
        )
        if not in_range:
            raise _output_too_large(layer, seq_id)
        ok = np.all(got == expected, axis=2)
        if not bool(np.all(ok)):
            row, head = (int(v) for v in np.argwhere(~ok)[0])
            raise _wrong_output(layer, seq_id, start + row, head + first_kv_head * self._group)
        self.counts.attention_rows += ok.size

    def batch_outputs(self, layer: int, batch: Batch, claimed_i64: I64, expected: list[U64]) -> None:
        """`outputs` for all runs of a batch in one pass; each run by itself only to name what is wrong.

        Shapes: claimed (tokens of the batch, heads, d), expected one (tokens, heads, 2) for each run.
        Raises: AttentionMismatch.
        """
        if len(expected) > 1:
            wanted = np.concatenate(expected)
            got, in_range = project_outputs(claimed_i64, self.keys.attention(layer))
            if in_range and got.shape == wanted.shape and np.array_equal(got, wanted):
                self.counts.attention_rows += got.shape[0] * got.shape[1]
                return
        for entry, rows, pg in zip(batch.entries, batch.slices(), expected, strict=True):
            self.outputs(layer, entry.seq_id, entry.start, claimed_i64[rows], pg)

    def close(self) -> None:
        """Overwrite all state that depends on secrets."""
        self.cache.close()


Attention = Callable[[int, Batch, AttentionInput], tuple[I64, I32]]


class Split(Protocol):
    """Attention that is shared with the prover where a sequence has outgrown it (verifier/split.py)."""

    def attention(
        self, layer: int, batch: Batch, x: AttentionInput, whole: Attention, *, mediated: bool
    ) -> tuple[I64, I32]:
        """`whole` for the sequences that the prover holds, the shared way for the others."""
        ...


#: Claims from this size on go into memory that is used again.
_KEPT_BYTES = 4 << 20


class ClaimMemory:
    """Private memory for one large claim after the other.

    Fresh memory costs more than copying a claim: every page of it comes zeroed from the kernel. A claim's array is
    gone with the next one, which is what the forward pass is content with: it uses each before it asks for another.
    """

    def __init__(self) -> None:
        self._block: U8 = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: type[_Integer]) -> npt.NDArray[_Integer]:
        """An uninitialised array; small ones are new."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < _KEPT_BYTES:
            return np.empty(shape, dtype)
        if self._block.nbytes < size:
            self._block = np.empty(0, np.uint8)  # given back before more is taken
            self._block = np.empty(size, np.uint8)
        return self._block[:size].view(dtype).reshape(shape)


#: A layer's claims are worth this many short sleeps: being a few layers behind costs nothing before the last.
_NAPS = 10


class RunAheadOperations:
    """`spec.forward.Operations` over the claims of a prover that runs ahead: take the next one, check it, return it.

    Every shared byte is copied once into private memory; the copy is checked and the copy is used.
    """

    def __init__(
        self, checker: ClaimChecker, channel: Channel, attention_check: AttentionCheck, split: Split | None = None
    ) -> None:
        self._checker, self._channel, self._split = checker, channel, split
        #: May change between steps. `attention_s`: wall time in attention so far, waiting included.
        self.attention_check, self.attention_s = attention_check, 0.0
        self._claims: Claims | None = None  # of one layer after the other: nothing is kept of them
        self._memory = ClaimMemory()

    def fused_layer(self, ctx: StepContext, i: int, layer: LayerTensors, x: F32) -> F32 | None:
        """See `FusedOperations`. Raises: as `linear` and `attention`."""
        if (
            self.attention_check is not AttentionCheck.REPLAY
            or self._split is not None
            or self._checker.cache.tracks_scores
        ):
            return None
        if self._checker.trace.enabled or not hasattr(ctx.kernels, "local_layer"):
            return None
        if self._claims is None or self._claims[0].shape[0] != x.shape[0]:
            self._claims = claim_buffers(self._checker.config, x.shape[0])
        t = time.monotonic()
        self._channel.recv_all(Kind.CLAIM, self._claims, naps=_NAPS)
        self._checker.counts.receive_s += time.monotonic() - t
        return self._checker.layer(ctx, i, layer, x, self._claims)

    def _receive(self, out: npt.NDArray[np.generic]) -> None:
        t = time.monotonic()
        self._channel.recv(Kind.CLAIM, out.nbytes, out)
        self._checker.counts.receive_s += time.monotonic() - t

    def linear(self, name: str, a_i8: I8) -> I32:
        """See `Operations.linear`. Raises: FreivaldsMismatch; ProverFault and below."""
        self._checker.trace.label = name
        claimed_i32 = self._memory.array((a_i8.shape[0], self._checker.shapes[name][0]), np.int32)
        self._receive(claimed_i32)
        return self._checker.linear(name, a_i8, claimed_i32)

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """See `Operations.attention`. Raises: AttentionMismatch; ProverFault and below."""
        t = time.monotonic()
        if self._split is None:
            result = self._whole(layer, batch, x)
        else:
            result = self._split.attention(layer, batch, x, self._whole, mediated=False)
        self.attention_s += time.monotonic() - t
        return result

    def _whole(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        checker, c = self._checker, self._checker.config
        slices = batch.slices()
        checker.trace.label = f"layers.{layer}.attention"
        before = checker.append(layer, batch, x)
        expected, row_sums = [], []
        for entry, rows, c_before in zip(batch.entries, slices, before, strict=True):
            q, q_scale, start = x.q_i8[rows], x.q_scale[rows], entry.start
            if self.attention_check is AttentionCheck.TRANSFER:
                shape = (c.num_heads, entry.num_tokens, start + entry.num_tokens)
                claimed_scores = self._memory.array(shape, np.int32)
                self._receive(claimed_scores)
                row_sum, pg = checker.expected_by_transfer(
                    layer, entry.seq_id, start, q, q_scale, x.k_i8[rows], c_before, claimed_scores
                )
            else:
                row_sum, pg = checker.expected_by_replay(layer, entry.seq_id, start, q, q_scale)
            expected.append(pg)
            row_sums.append(row_sum)
        claimed_i64 = self._memory.array((batch.num_tokens, c.num_heads, c.head_dim), np.int64)
        self._receive(claimed_i64)
        checker.batch_outputs(layer, batch, claimed_i64, expected)
        return claimed_i64, np.concatenate(row_sums)
