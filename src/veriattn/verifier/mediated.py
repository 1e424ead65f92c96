"""The TEE-mediated flows: `veriattn` (the paper's two-level pipeline) and `tsdp` (one operation after the other)."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from veriattn.errors import FreivaldsMismatch, InternalError, VeriattnError
from veriattn.native import key_projection
from veriattn.native.kernels import attention_weights_paged
from veriattn.shield.permutation import Shield
from veriattn.spec.forward import AttentionInput, Batch
from veriattn.spec.reference import I8, I32, I64
from veriattn.verifier.checks import ClaimChecker, ClaimMemory, Split
from veriattn.verifier.own import OwnLayers
from veriattn.verifier.tiling import AutoTiling, Tiling, score_groups
from veriattn.wire.channel import Channel
from veriattn.wire.messages import AttentionCheck, Buffer, Kind
from veriattn.wire.operations import (
    AttendRequest,
    LinearRequest,
    Reply,
    Run,
    WeightsRequest,
    encode_attend,
    encode_linear,
    encode_weights,
    row_tiles,
)

_Integer = TypeVar("_Integer", np.int32, np.int64)

#: Rows of a linear that travel together under the pipeline: large enough for the matrix kernels, small enough to overlap.
LINEAR_TILE_ROWS = 128


class QueuedSender:
    """Sends on a thread of its own, so that requests are under way while claims are taken.

    A channel allows one sender beside one receiver. An error is kept and raised by the next call; the receiving side meets
    the broken link by itself. One thread calls `send`, `send_now` and `flush`.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[tuple[Kind, list[Buffer]] | threading.Event | None] = queue.SimpleQueue()
        self._error: VeriattnError | None = None
        self._put = self._taken = 0  # messages for the thread, and those that it is done with
        self._thread = threading.Thread(target=self._run, name="veriattn-sender", daemon=True)
        self._thread.start()

    def send(self, kind: Kind, parts: list[Buffer]) -> None:
        """Queue a message; its parts stay as they are until it has left."""
        self._put += 1
        self._queue.put((kind, parts))

    def send_now(self, kind: Kind, parts: list[Buffer]) -> None:
        """Send from the calling thread. Only while the prover owes no answer: it takes what comes then, and neither side
        can wait for the other. Raises: what sending raises."""
        self.flush()
        self._channel.send(kind, *parts)

    def flush(self) -> None:
        """Wait until everything has been handed to the link. Raises: what sending raised."""
        if self._taken != self._put:
            done = threading.Event()
            self._queue.put(done)
            done.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread once the queue is empty, or the channel gone."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            if self._error is None:
                try:
                    self._channel.send(item[0], *item[1])
                except VeriattnError as e:
                    self._error = e
            self._taken += 1


class _Mediated(ABC):
    """What both flows share: requests out, claims in, linears."""

    def __init__(
        self, checker: ClaimChecker, channel: Channel, split: Split | None, shield: Shield | None, own: OwnLayers | None
    ) -> None:
        self._checker, self._channel, self._split, self._shield, self._own = checker, channel, split, shield, own
        self._index = {name: i for i, name in enumerate(checker.shapes)}
        self._memory = ClaimMemory()
        self.attention_s = 0.0  # wall time in attention so far, waiting included

    def _receive(self, out: npt.NDArray[_Integer]) -> npt.NDArray[_Integer]:
        start = time.monotonic()
        self._channel.recv(Kind.CLAIM, out.nbytes, out)
        self._checker.counts.receive_s += time.monotonic() - start
        return out

    def attention(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """See `Operations.attention`."""
        if self._own is not None and layer < self._own.count:
            return self._own.attention(layer, batch, x)
        start = time.monotonic()
        if self._split is None:
            result = self._whole(layer, batch, x)
        else:
            result = self._split.attention(layer, batch, x, self._whole, mediated=True)
        self.attention_s += time.monotonic() - start
        return result

    def linear(self, name: str, a_i8: I8) -> I32:
        """See `Operations.linear`. The first layers' projections stay here where the session says so."""
        self._checker.trace.label = name
        if self._own is not None and self._own.has(name):
            return self._own.linear(name, a_i8)
        return self._ask_linear(name, a_i8)

    def _check_linear(self, name: str, a_i8: I8, claimed_i32: I32) -> I32:
        """Check a claim, which a shield permutes for the q, k and v projections. Raises: FreivaldsMismatch."""
        layer, _, operation = name.removeprefix("layers.").partition(".")
        if self._shield is not None and operation == "qkv":
            claimed_i32 = self._shield.restore_projection(int(layer), claimed_i32)
        return self._checker.linear(name, a_i8, claimed_i32)

    def _shown(self, layer: int, batch: Batch, x: AttentionInput) -> AttentionInput:
        """Operands as the prover gets them."""
        return x if self._shield is None else self._shield.apply(layer, batch, x)

    def _restored(self, layer: int, seq_id: int, claimed_i64: I64, first_kv_head: int = 0) -> I64:
        """Claimed outputs in the model's order of dimensions."""
        if self._shield is None:
            return claimed_i64
        return self._shield.restore_outputs(layer, seq_id, claimed_i64, first_kv_head)

    @abstractmethod
    def _ask_linear(self, name: str, a_i8: I8) -> I32:
        """Have the prover compute a linear, and check it."""

    @abstractmethod
    def _whole(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """Attention of sequences whose keys the prover holds."""

    def _request_linear(self, name: str, a_i8: I8) -> list[Buffer]:
        return encode_linear(LinearRequest(self._index[name], a_i8))


class TsdpOperations(_Mediated):
    """The published baseline: linears, q.k and p.v on the prover, softmax here, strictly one after the other.

    Scores and outputs are checked; attention weights are the verifier's own and travel back. So many rows at a time that
    their scores stay below a bound: memory that is used again costs less than memory that is new. Raises: as `ClaimChecker`.
    """

    def _ask_linear(self, name: str, a_i8: I8) -> I32:
        self._channel.send(Kind.LINEAR, *self._request_linear(name, a_i8))
        claimed = self._receive(self._memory.array((a_i8.shape[0], self._checker.shapes[name][0]), np.int32))
        return self._check_linear(name, a_i8, claimed)

    def _whole(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        groups = score_groups([(e.start, e.num_tokens) for e in batch.entries], self._checker.config.num_heads)
        if len(groups) == 1:
            return self._rows(layer, batch, x)
        o, row_sum = np.empty(x.q_i8.shape, np.int64), np.empty(x.q_i8.shape[:2], np.int32)
        slices, done = batch.slices(), 0
        for group in groups:
            entries = [batch.entries[i].part(at, n) for i, at, n in group]
            rows = [slice(slices[i].start + at, slices[i].start + at + n) for i, at, n in group]
            # Pieces of neighbouring runs: their rows follow one another.
            to = slice(rows[0].start, rows[-1].stop)
            part = AttentionInput(x.q_i8[to], x.q_scale[to], x.k_i8[to], x.k_scale[to], x.v_i8[to])
            o[to], row_sum[to] = self._rows(layer, Batch(tuple(entries)), part)
            done = to.stop
        if done != batch.num_tokens:
            raise InternalError("rows of a batch were left out")
        return o, row_sum

    def _rows(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        """One request for scores, and one for outputs of each of its runs."""
        checker, c = self._checker, self._checker.config
        checker.trace.label = f"layers.{layer}.attention"
        before = checker.append(layer, batch, x)
        runs = tuple(Run(e.seq_id, e.start, e.num_tokens) for e in batch.entries)
        s = self._shown(layer, batch, x)
        request = AttendRequest(
            layer, 0, c.num_kv_heads, Reply.SCORES, batch.num_tokens, runs, s.q_i8, s.q_scale, s.k_i8, s.k_scale, s.v_i8
        )
        self._channel.send(Kind.ATTEND, *encode_attend(request))
        cache = checker.cache.layer(layer)
        outputs, row_sums, checked = [], [], []
        for run, rows, c_before in zip(runs, batch.slices(), before, strict=True):
            keys = run.start + run.num_tokens
            scores = self._receive(np.empty((c.num_heads, run.num_tokens, keys), np.int32))
            q, q_scale = x.q_i8[rows], x.q_scale[rows]
            row_sum, pg = checker.expected_by_transfer(
                layer, run.seq_id, run.start, q, q_scale, x.k_i8[rows], c_before, scores
            )
            with checker.trace.span("replay"):  # the softmax, which this flow keeps here
                p_u16 = attention_weights_paged(
                    scores, q_scale, cache.arrays["k_scale"], cache.table(run.seq_id), run.start
                )
            row_sums.append(row_sum)
            checked.append((run, pg, p_u16))
        for run, pg, p_u16 in checked:
            self._channel.send(Kind.WEIGHTS, *encode_weights(WeightsRequest(layer, run.seq_id, p_u16)))
            claimed = self._receive(np.empty((run.num_tokens, c.num_heads, c.head_dim), np.int64))
            claimed = self._restored(layer, run.seq_id, claimed)
            checker.outputs(layer, run.seq_id, run.start, claimed, pg)
            outputs.append(claimed)
        return np.concatenate(outputs), np.concatenate(row_sums)


class VeriattnOperations(_Mediated):
    """The paper's workflow: all of attention on the prover, in head blocks and row tiles that overlap.

    While this side checks tile j of block b, the prover computes tile j + 1 and block b + 1 is already on its way to it.
    Raises: as `ClaimChecker`.
    """

    def __init__(
        self,
        checker: ClaimChecker,
        channel: Channel,
        sender: QueuedSender,
        attention_check: AttentionCheck,
        tiling: Tiling | Literal["auto"] | None,
        split: Split | None,
        shield: Shield | None,
        own: OwnLayers | None,
    ) -> None:
        super().__init__(checker, channel, split, shield, own)
        self._sender, self.attention_check = sender, attention_check
        self._tiling = None if tiling == "auto" else tiling
        self._auto = AutoTiling() if tiling == "auto" else None

    def _ask_linear(self, name: str, a_i8: I8) -> I32:
        # Rows travel in tiles, so that checking one overlaps with computing the next.
        pipeline = self._tiling is None or self._tiling.pipeline
        tiles = row_tiles(a_i8.shape[0], LINEAR_TILE_ROWS if pipeline else a_i8.shape[0])
        self._sender.send_now(Kind.LINEAR, self._request_linear(name, a_i8[tiles[0]]))
        for tile in tiles[1:]:
            self._sender.send(Kind.LINEAR, self._request_linear(name, a_i8[tile]))
        verified = self._memory.array((a_i8.shape[0], self._checker.shapes[name][0]), np.int32)
        for tile in tiles:
            try:
                verified[tile] = self._check_linear(name, a_i8[tile], self._receive(verified[tile]))
            except FreivaldsMismatch as e:
                e.rows = tuple(row + tile.start for row in e.rows)  # of the batch: they say whose claims are wrong
                raise
        return verified

    def _whole(self, layer: int, batch: Batch, x: AttentionInput) -> tuple[I64, I32]:
        checker, c = self._checker, self._checker.config
        group = c.num_heads // c.num_kv_heads
        longest = max(e.start + e.num_tokens for e in batch.entries)
        most_rows = max(e.num_tokens for e in batch.entries)
        if self._auto is not None:
            tiling = self._auto.next(longest, most_rows, c.num_kv_heads)
        else:
            tiling = self._tiling or Tiling.default(longest, most_rows)
        blocks, tile_rows = tiling.kv_blocks(c.num_kv_heads), tiling.tile_rows(most_rows)
        checker.trace.label = f"layers.{layer}.attention"
        transfer = self.attention_check is AttentionCheck.TRANSFER
        runs = tuple(Run(e.seq_id, e.start, e.num_tokens) for e in batch.entries)
        before = checker.append(layer, batch, x)
        outputs = self._memory.array((batch.num_tokens, c.num_heads, c.head_dim), np.int64)
        row_sums = np.empty((batch.num_tokens, c.num_heads), np.int32)
        shown = self._shown(layer, batch, x)

        def request(kv: range, send: Callable[[Kind, list[Buffer]], None]) -> None:
            heads, kvs = slice(kv.start * group, kv.stop * group), slice(kv.start, kv.stop)
            reply = Reply.SCORES_AND_OUTPUTS if transfer else Reply.OUTPUTS
            block = AttendRequest(
                layer,
                kv.start,
                len(kv),
                reply,
                tile_rows,
                runs,
                np.ascontiguousarray(shown.q_i8[:, heads]),
                np.ascontiguousarray(shown.q_scale[:, heads]),
                np.ascontiguousarray(shown.k_i8[:, kvs]),
                np.ascontiguousarray(shown.k_scale[:, kvs]),
                np.ascontiguousarray(shown.v_i8[:, kvs]),
            )
            send(Kind.ATTEND, encode_attend(block))

        started = time.monotonic()
        request(blocks[0], self._sender.send_now)
        for b, kv in enumerate(blocks):
            if tiling.pipeline and b + 1 < len(blocks):
                request(blocks[b + 1], self._sender.send)
            heads, kvs = slice(kv.start * group, kv.stop * group), slice(kv.start, kv.stop)
            for run, rows, c_before in zip(runs, batch.slices(), before, strict=True):
                sums = np.ascontiguousarray(c_before[kvs]) if transfer else c_before
                for tile in row_tiles(run.num_tokens, tile_rows):
                    at = slice(rows.start + tile.start, rows.start + tile.stop)
                    start = run.start + tile.start
                    q, q_scale = x.q_i8[at, heads], x.q_scale[at, heads]
                    if checker.trace.enabled:
                        rows_ = f"rows {tile.start}-{tile.stop - 1}"
                        checker.trace.label = f"layers.{layer}.attention heads {heads.start}-{heads.stop - 1} {rows_}"
                    if transfer:
                        k = np.ascontiguousarray(x.k_i8[at, kvs])
                        shape = (q.shape[1], q.shape[0], start + q.shape[0])
                        scores = self._receive(np.empty(shape, np.int32))
                        row_sum, pg = checker.expected_by_transfer(
                            layer, run.seq_id, start, q, q_scale, k, sums, scores, kv
                        )
                        key_projection(k, checker.keys.positions(start + q.shape[0]), start, sums)
                    else:
                        row_sum, pg = checker.expected_by_replay(layer, run.seq_id, start, q, q_scale, kv)
                    claimed = self._receive(np.empty((*q.shape[:2], c.head_dim), np.int64))
                    claimed = self._restored(layer, run.seq_id, claimed, kv.start)
                    checker.outputs(layer, run.seq_id, start, claimed, pg, kv.start)
                    outputs[at, heads], row_sums[at, heads] = claimed, row_sum
        if self._auto is not None:
            self._auto.took(tiling, most_rows, time.monotonic() - started)
        return outputs, row_sums
