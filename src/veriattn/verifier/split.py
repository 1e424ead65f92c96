"""Split attention: keys that the prover cannot hold live here; some are streamed to it, the rest is computed here.

The prover's share is checked like transferred scores; our own share needs no check. Both are relative to the global row
maximum, which is taken from checked scores, so the sums are the same bits for every capacity and every split.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from veriattn.errors import AttentionMismatch, InternalError
from veriattn.native import attention_weights_paged, linear_check
from veriattn.native.partial import (
    share_maximum_into,
    share_outputs_into,
    share_projection_into,
    share_scores_into,
    share_weights_into,
    tail_attention,
    tail_maximum,
)
from veriattn.shield.permutation import Shield
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry
from veriattn.spec.kv import PAGE, PagedCache
from veriattn.spec.partial import share_sums
from veriattn.spec.reference import F32, I8, I32, I64, gather_pages
from veriattn.verifier.checks import LYING, Attention, ClaimChecker
from veriattn.verifier.keys import REPETITIONS, U64
from veriattn.verifier.offload import Controller, Measurement
from veriattn.verifier.overflow import OverflowCache
from veriattn.verifier.tiling import score_tiles
from veriattn.wire.channel import Channel
from veriattn.wire.messages import Buffer, Kind
from veriattn.wire.split import (
    SplitRequest,
    block_sizes,
    encode_key_block,
    encode_split,
    encode_value_block,
)


def exchanges(tokens: int, beyond: int, limit: int, ratio: float, heads: int) -> list[tuple[int, int]]:
    """First row and rows of the exchanges of a run of `tokens`, `beyond` keys of whose sequence lie beyond the limit."""
    return score_tiles(tokens, limit + int(ratio * beyond), heads)


@dataclass
class SplitStats:
    """Keys attended to by shared runs, summed over steps (of one layer): resident at the prover, streamed to it, ours;
    the controller's decision after every step, and how often a layer tried another ratio; the ratios of all layers in the last
    two steps (a batch that crosses limits takes two)."""

    prover_tokens: int = 0
    streamed_tokens: int = 0
    tee_tokens: int = 0
    ratios: list[float] = field(default_factory=list)
    trials: int = 0
    used: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=2))

    def counters(self) -> dict[str, Any]:
        """Under the names of the engine's report. The ratio is the last step's, None before the first."""
        return {
            "kv_prover_tokens": self.prover_tokens,
            "kv_streamed_tokens": self.streamed_tokens,
            "kv_tee_tokens": self.tee_tokens,
            "offload_ratio": self.ratios[-1] if self.ratios else None,
            "offload_ratios": tuple(self.ratios),
            "offload_trials": self.trials,
        }


class Sender(Protocol):
    """Sends on a thread of its own, in order; `flush` waits for it and raises what it raised."""

    def send(self, kind: Kind, parts: list[Buffer]) -> None: ...

    def flush(self) -> None: ...


#: Columns [at, at + keys) of a share's arrays, and where these keys are.
_Segment = tuple[int, int, dict[str, npt.NDArray[Any]], I32]


def _paged_scales(segments: list[_Segment], keys: int) -> tuple[F32, I32]:
    """Key scales of all segments as pages and their table: the seam between segments need not be that of a page."""
    parts = [gather_pages(a["k_scale"], table, count) for _, count, a, table in segments]
    pages = -(-keys // PAGE)
    flat = np.zeros((pages * PAGE, parts[0].shape[1]), np.float32)
    np.concatenate(parts, out=flat[:keys])
    return np.ascontiguousarray(flat.reshape(pages, PAGE, -1).swapaxes(1, 2)), np.arange(pages, dtype=np.int32)


class _OwnShare:
    """The verifier's part of one run's attention: row maxima first, then sums relative to the maximum over all keys.

    A single row sees all keys of the share, so its scores are kept between the two steps; several rows are computed in tiles
    that stay in a core's cache, twice.
    """

    def __init__(self, cache: PagedCache, table: I32, start: int, q_i8: I8, q_scale: F32) -> None:
        self._a, self._table, self._start, self._q, self._q_scale = cache.arrays, table, start, q_i8, q_scale
        self._scores: I32 | None = None

    def maximum(self) -> F32:
        """Row maxima, (rows, heads)."""
        rows, heads, _ = self._q.shape
        if rows > 1:
            return tail_maximum(self._q, self._a["k"], self._a["k_scale"], self._table, self._start)
        keys = self._start + 1
        self._scores = np.empty((heads, 1, keys), np.int32)
        share_scores_into(self._scores, 0, keys, self._q, self._a["k"], self._table)
        row_max = np.full((1, heads), -np.inf, np.float32)
        share_maximum_into(row_max, self._scores, 0, keys, self._a["k_scale"], self._table)
        return row_max

    def attention(self, row_max: F32) -> tuple[I64, I32]:
        """O (rows, heads, d) and L (rows, heads) of the share."""
        a, table = self._a, self._table
        if self._scores is None:
            return tail_attention(self._q, self._q_scale, a["k"], a["k_scale"], a["v"], table, self._start, row_max)
        p_u16, row_sum = np.empty(self._scores.shape, np.uint16), np.zeros(row_max.shape, np.int32)
        keys, scale = self._start + 1, a["k_scale"]
        share_weights_into(p_u16, row_sum, None, self._scores, 0, keys, self._q_scale, scale, row_max, None, table)
        o = np.zeros(self._q.shape, np.int64)
        share_outputs_into(o, p_u16, 0, keys, a["v"], table)
        return o, row_sum


class SplitAttention:
    """Attention of runs that lie beyond their sequence's limit.

    Trust: the prover's scores and outputs are adversarial and checked; the maximum is ours, from checked scores.
    Soundness: as `ClaimChecker`; docs/soundness.md.
    """

    def __init__(
        self,
        checker: ClaimChecker,
        channel: Channel,
        sender: Sender,
        ratio: float | None,
        *,
        first_layer: int = 0,
        by_weights: bool = False,
        shield: Shield | None = None,
    ) -> None:
        """first_layer: those before it never come here. ratio: share that is streamed, None to adapt it."""
        self._shield = shield
        self._checker, self._channel, self._sender = checker, channel, sender
        self._send = sender.send
        self._by_weights = by_weights
        self._first_layer = first_layer
        self.limits: dict[int, int] = {}
        self.cache = OverflowCache(checker)
        self.stats = SplitStats()
        self._fixed = ratio
        #: What a key costs is not the same for one row and for many: a controller for decoding and one for prompts.
        self._controllers = {True: Controller(), False: Controller()}
        self._decoding = True
        self._used: list[float] = []
        self._counting = False
        self._positions: dict[int, U64] = {}

    def limit(self, seq_id: int) -> int | None:
        """How many leading positions of a sequence the prover keeps; None for all."""
        return self.limits.get(seq_id)

    def is_split(self, entry: BatchEntry) -> bool:
        """Whether a run lies beyond its sequence's limit."""
        limit = self.limits.get(entry.seq_id)
        return limit is not None and entry.start >= limit

    def fix_ratio(self, ratio: float | None) -> None:
        """Stream this share of the non-resident keys from now on; None goes on adapting from where that had been."""
        self._fixed = ratio

    def restart_controller(self) -> None:
        """Forget what was measured so far."""
        self._controllers = {True: Controller(), False: Controller()}

    @property
    def ratio(self) -> float:
        """The share of the non-resident keys that is streamed in the next layer."""
        return self._controllers[self._decoding].ratio if self._fixed is None else self._fixed

    def end_step(self) -> None:
        """Note the controller's decision, in the report and in the trace; drop what was kept for the step."""
        for challenges in self._positions.values():
            challenges[...] = 0
        self._positions.clear()
        if not self._used:
            return
        self.stats.used.append(tuple(self._used))
        self._used.clear()
        controller = self._controllers[self._decoding]
        self.stats.ratios.append(controller.best_ratio if self._fixed is None else self._fixed)
        trace = self._checker.trace
        if trace.enabled:
            now = time.monotonic()
            trace.add(
                "replay", now, now, f"offload ratio {self.stats.ratios[-1]:.3f}, {self.stats.trials} trials of others"
            )

    def _learn(self, keys: int, seconds: float) -> None:
        """Let the controller see what a layer's attention took."""
        if self._fixed is not None or self._by_weights:
            return
        before = self._controllers[self._decoding]
        if keys > 0:
            self.stats.trials += before.rung != before.best
        self._controllers[self._decoding] = before.update(Measurement(keys, seconds))

    def _receive(self, out: npt.NDArray[np.generic]) -> None:
        t = time.monotonic()
        self._channel.recv(Kind.CLAIM, out.nbytes, out)
        self._checker.counts.receive_s += time.monotonic() - t

    def attention(
        self, layer: int, batch: Batch, x: AttentionInput, whole: Attention, *, mediated: bool
    ) -> tuple[I64, I32]:
        """See `checks.Split`. Shapes as `Operations.attention`."""
        split = frozenset(e.seq_id for e in batch.entries if self.is_split(e))
        if not split:
            return whole(layer, batch, x)
        o = np.empty(x.q_i8.shape, np.int64)
        row_sum = np.empty(x.q_i8.shape[:2], np.int32)
        rest, rows = batch.without(split)
        if rest is not None:
            part = AttentionInput(x.q_i8[rows], x.q_scale[rows], x.k_i8[rows], x.k_scale[rows], x.v_i8[rows])
            o[rows], row_sum[rows] = whole(layer, rest, part)
        shared = [(e, at) for e, at in zip(batch.entries, batch.slices(), strict=True) if e.seq_id in split]
        self._decoding = all(e.num_tokens == 1 for e, _ in shared)
        self._used.append(self.ratio)
        work, began = 0, time.monotonic()
        for entry, at in shared:
            for tile, to in self._tiles(entry, at.start):
                part = AttentionInput(x.q_i8[to], x.q_scale[to], x.k_i8[to], x.k_scale[to], x.v_i8[to])
                share = self._weigh if self._by_weights else self._share
                self._counting = layer == self._first_layer and to.stop == at.stop  # once a run, whatever its tiles
                o[to], row_sum[to] = share(layer, tile, part, mediated)
                work += tile.num_tokens * (tile.start + tile.num_tokens - self.limits[tile.seq_id])
        self._sender.flush()
        self._learn(work, time.monotonic() - began)
        return o, row_sum

    def _tiles(self, entry: BatchEntry, row: int) -> Iterator[tuple[BatchEntry, slice]]:
        """A run cut into exchanges, and where the rows of each are."""
        limit, heads = self.limits[entry.seq_id], self._checker.config.num_heads
        ratio = 1.0 if self._by_weights else self.ratio
        for at, n in exchanges(entry.num_tokens, entry.start + entry.num_tokens - limit, limit, ratio, heads):
            yield entry.part(at, n), slice(row + at, row + at + n)

    def _share(self, layer: int, entry: BatchEntry, x: AttentionInput, mediated: bool) -> tuple[I64, I32]:
        """Store the run's keys and values and attend, sharing the work.

        mediated: the prover gets the queries from here; otherwise it has its own and gets our share back.
        Raises: AttentionMismatch; ProverFault and below.
        """
        checker, cache = self._checker, self.cache.layer(layer)
        limit, q_i8, q_scale = self.limits[entry.seq_id], x.q_i8, x.q_scale
        self.cache.append(layer, entry, limit, x.k_i8, x.k_scale, x.v_i8)
        before = entry.start - limit
        streamed = min(before // PAGE, int(self.ratio * (before + entry.num_tokens)) // PAGE) * PAGE
        own = _OwnShare(cache, cache.table(entry.seq_id)[streamed // PAGE :], before - streamed, q_i8, q_scale)
        share = limit + streamed
        request = SplitRequest(
            entry.seq_id, layer, entry.num_tokens, limit, streamed, False,
            self._shown_queries(layer, entry, q_i8) if mediated else None, q_scale if mediated else None,
        )  # fmt: skip
        if share or not mediated:
            self._send(Kind.SPLIT, encode_split(request))
        self._stream_keys(layer, entry.seq_id, streamed)
        trace = checker.trace
        trace.label = f"layers.{layer}.attention.{entry.seq_id}"
        with trace.span("replay", f"{trace.label}, own scores"):
            row_max = own.maximum()
        if share:
            claimed_scores = np.empty((q_i8.shape[1], entry.num_tokens, share), np.int32)
            self._receive(claimed_scores)
            with trace.span("check"):
                self._check_scores(layer, entry, limit, streamed, q_i8, claimed_scores)
            segments = self._segments(layer, entry.seq_id, limit, streamed)
            for at, count, a, table in segments:
                share_maximum_into(row_max, claimed_scores, at, count, a["k_scale"], table)
            self._send(Kind.NORMALISER, [row_max])
            self._stream_values(layer, entry.seq_id, streamed)
            pg, row_sum = np.zeros((*row_max.shape, REPETITIONS), np.uint64), np.zeros(row_max.shape, np.int32)
            for at, count, a, table in segments:
                share_weights_into(
                    None, row_sum, pg, claimed_scores, at, count, q_scale, a["k_scale"], row_max, a["g"], table
                )
        with trace.span("replay", f"{trace.label}, own share"):
            o, own_sum = own.attention(row_max)
        if not mediated:
            self._send(Kind.SHARE, [o, own_sum])
        if share:
            claimed_o = np.empty(o.shape, np.int64)
            self._receive(claimed_o)
            claimed_o = self._restored(layer, entry, claimed_o)
            checker.outputs(layer, entry.seq_id, entry.start, claimed_o, pg)
            o, own_sum = o + claimed_o, own_sum + row_sum
        self._account(entry, limit, streamed)
        return o, own_sum

    def _account(self, entry: BatchEntry, limit: int, streamed: int) -> None:
        if self._counting:
            self.stats.prover_tokens += limit
            self.stats.streamed_tokens += streamed
            self.stats.tee_tokens += entry.start + entry.num_tokens - limit - streamed

    def _weigh(self, layer: int, entry: BatchEntry, x: AttentionInput, mediated: bool) -> tuple[I64, I32]:
        """The same under `tsdp`: every non-resident key and value crosses the link, softmax is computed here."""
        if not mediated:
            raise InternalError("weights travel only where the verifier asks for each operation")
        limit, q_i8, q_scale = self.limits[entry.seq_id], x.q_i8, x.q_scale
        self.cache.append(layer, entry, limit, x.k_i8, x.k_scale, x.v_i8)
        keys = entry.start + entry.num_tokens
        streamed = keys - limit
        shown = self._shown_queries(layer, entry, q_i8)
        request = SplitRequest(entry.seq_id, layer, entry.num_tokens, limit, streamed, True, shown, q_scale)
        self._send(Kind.SPLIT, encode_split(request))
        self._stream_keys(layer, entry.seq_id, streamed)
        claimed_scores = np.empty((q_i8.shape[1], entry.num_tokens, keys), np.int32)
        self._receive(claimed_scores)
        self._check_scores(layer, entry, limit, streamed, q_i8, claimed_scores)
        segments = self._segments(layer, entry.seq_id, limit, streamed)
        p_u16 = attention_weights_paged(claimed_scores, q_scale, *_paged_scales(segments, keys), entry.start)
        self._send(Kind.NORMALISER, [p_u16])
        self._stream_values(layer, entry.seq_id, streamed)
        claimed_o = np.empty(q_i8.shape, np.int64)
        self._receive(claimed_o)
        claimed_o = self._restored(layer, entry, claimed_o)
        pg = np.zeros((*q_scale.shape, REPETITIONS), np.uint64)
        for at, count, a, table in segments:
            share_projection_into(pg, p_u16, at, count, a["g"], table)
        self._checker.outputs(layer, entry.seq_id, entry.start, claimed_o, pg)
        self._account(entry, limit, streamed)
        return claimed_o, share_sums(p_u16)

    def _check_scores(
        self, layer: int, entry: BatchEntry, limit: int, streamed: int, q_i8: I8, claimed_scores: I32
    ) -> None:
        """Every claimed score of every row, visible or not, against sum_j r_j k_j: a linear check with the keys as weights."""
        checker = self._checker
        blocks = -(-streamed // PAGE)
        c = self.cache.challenge_sum(layer, entry.seq_id, blocks, checker.cache.challenge_sum(layer, entry.seq_id))
        if streamed % PAGE and limit + streamed != entry.start + entry.num_tokens:
            raise InternalError("a share that ends inside a block")
        r = self._challenges(limit + streamed)
        kv_heads, rows = c.shape[0], entry.num_tokens
        group = q_i8.shape[1] // kv_heads
        for kv in range(kv_heads):
            heads = slice(kv * group, (kv + 1) * group)
            q = np.ascontiguousarray(q_i8[:, heads].swapaxes(0, 1)).reshape(group * rows, -1)
            ok = linear_check(claimed_scores[heads].reshape(group * rows, -1), r, q, c[kv])
            if not bool(np.all(ok)):
                head, row = divmod(int(np.argmin(ok)), rows)
                raise AttentionMismatch(
                    f"layers.{layer}.attention, sequence {entry.seq_id}, position {entry.start + row}, "
                    f"head {kv * group + head}: the claimed scores are wrong",
                    hint=LYING,
                    sequences=[entry.seq_id],
                )

    def _challenges(self, keys: int) -> U64:
        """Challenges of the first positions in one piece; kept for the step, since all of its layers ask for the same."""
        kept = self._positions.get(keys)
        if kept is None:
            # A copy even where it is the whole array: this one is overwritten after the step, the session's must live on.
            kept = self._positions[keys] = self._checker.keys.positions(keys)[:, :keys].copy()
        return kept

    def _segments(self, layer: int, seq_id: int, limit: int, streamed: int) -> list[_Segment]:
        """The prover's share, in its order: first column, keys, the arrays and the block table that hold them."""
        resident, ours = self._checker.cache.layer(layer), self.cache.layer(layer)
        both = (
            (0, limit, resident.arrays, resident.table(seq_id)),
            (limit, streamed, ours.arrays, ours.table(seq_id)),
        )
        return [segment for segment in both if segment[1]]

    def _shown_queries(self, layer: int, entry: BatchEntry, q_i8: I8) -> I8:
        return q_i8 if self._shield is None else self._shield.layer(layer, entry.seq_id).qk.apply(q_i8)

    def _restored(self, layer: int, entry: BatchEntry, claimed_i64: I64) -> I64:
        if self._shield is None:
            return claimed_i64
        return self._shield.restore_outputs(layer, entry.seq_id, claimed_i64)

    def _stream_keys(self, layer: int, seq_id: int, streamed: int) -> None:
        cache = self.cache.layer(layer)
        a = cache.arrays
        for page, count in zip(cache.table(seq_id), block_sizes(streamed), strict=False):
            # A whole page goes out from where it is: what its keys are does not change before the sender is flushed.
            k = np.ascontiguousarray(a["k"][page, :, :count])
            if self._shield is not None:
                k = self._shield.layer(layer, seq_id).qk.apply_by_head(k)
            scale = np.ascontiguousarray(a["k_scale"][page, :, :count])
            self._send(Kind.BLOCK, encode_key_block(k, scale))

    def _stream_values(self, layer: int, seq_id: int, streamed: int) -> None:
        cache = self.cache.layer(layer)
        for page, count in zip(cache.table(seq_id), block_sizes(streamed), strict=False):
            v = np.ascontiguousarray(cache.arrays["v"][page, :, :count])
            if self._shield is not None:
                v = self._shield.layer(layer, seq_id).v.apply_by_head(v)
            self._send(Kind.BLOCK, encode_value_block(v))

    def free(self, seq_id: int) -> None:
        """Forget a sequence."""
        self.limits.pop(seq_id, None)
        self.cache.free(seq_id)

    def close(self) -> None:
        """Overwrite all state that depends on secrets."""
        for challenges in self._positions.values():
            challenges[...] = 0
        self._positions.clear()
        self.cache.close()
