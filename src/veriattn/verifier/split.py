"""Split attention: keys that the prover cannot hold live here; some are streamed to it, the rest is computed here.

The prover's share is checked like transferred scores; our own share needs no check. Both are relative to the global row
maximum, which is taken from checked scores, so the sums are the same bits for every capacity and every split.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from veriattn.errors import AttentionMismatch, ConfigError, InternalError
from veriattn.native import attention_weights_paged, key_projection, linear_check, value_projection
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
from veriattn.spec.model import ModelConfig
from veriattn.spec.partial import share_sums
from veriattn.spec.reference import F32, I8, I32, I64, gather_pages
from veriattn.verifier.checks import LYING, Attention, ClaimChecker
from veriattn.verifier.keys import REPETITIONS, U64
from veriattn.verifier.offload import Controller, Measurement
from veriattn.wire.channel import Channel
from veriattn.wire.messages import Buffer, Kind
from veriattn.wire.split import (
    SplitRequest,
    block_sizes,
    encode_key_block,
    encode_split,
    encode_value_block,
)


@dataclass
class SplitStats:
    """Keys attended to by shared runs, summed over steps (of one layer): resident at the prover, streamed to it, ours;
    the most that keys and values here took; the ratio of every step."""

    prover_tokens: int = 0
    streamed_tokens: int = 0
    tee_tokens: int = 0
    tee_bytes: int = 0
    ratios: list[float] = field(default_factory=list)

    def counters(self) -> dict[str, Any]:
        """Under the names of the engine's report. The ratio is the last step's, None before the first."""
        return {
            "kv_prover_tokens": self.prover_tokens,
            "kv_streamed_tokens": self.streamed_tokens,
            "kv_tee_tokens": self.tee_tokens,
            "kv_tee_bytes": self.tee_bytes,
            "offload_ratio": self.ratios[-1] if self.ratios else None,
            "offload_ratios": tuple(self.ratios),
        }


class OverflowCache:
    """Keys and values beyond the prover's capacity, per layer, with the challenge sum of every block of 256.

    Position j of a sequence with limit C is entry j - C here, so pages are blocks and any run of blocks is a block table.
    Raises: ConfigError before `max_bytes` would be exceeded.
    """

    def __init__(self, checker: ClaimChecker, max_bytes: int | None) -> None:
        c = checker.config
        fields: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {
            "k": (np.dtype(np.int8), (c.head_dim,)),
            "k_scale": (np.dtype(np.float32), ()),
            "v": (np.dtype(np.int8), (c.head_dim,)),
            "g": (np.dtype(np.uint64), (REPETITIONS,)),
        }
        self._checker, self._max_bytes = checker, max_bytes
        self._layers = [PagedCache(c.num_kv_heads, fields, 1 << 20) for _ in range(c.num_layers)]
        self._block_sums: list[dict[int, list[U64]]] = [{} for _ in range(c.num_layers)]

    def reserve(self, tokens: int) -> None:
        """Refuse a step whose new keys would pass the memory limit. Raises: ConfigError."""
        if self._max_bytes is None:
            return
        need = self.nbytes + key_bytes(self._checker.config) * (tokens + PAGE)
        if need > self._max_bytes:
            raise ConfigError(
                f"keys and values in the TEE would need {need} bytes, the limit is {self._max_bytes}",
                hint="raise --tee-memory, give the prover more keys, or run fewer or shorter sequences",
            )

    def append(self, layer: int, entry: BatchEntry, limit: int, k_i8: I8, k_scale: F32, v_i8: I8) -> None:
        """Store a run that lies beyond the limit."""
        cache, keys = self._layers[layer], self._checker.keys
        cache.extend(entry.seq_id, entry.num_tokens)
        g = value_projection(v_i8, keys.attention(layer))
        at = entry.start - limit
        cache.write(entry.seq_id, at, k=k_i8, k_scale=k_scale, v=v_i8, g=g)
        sums = self._block_sums[layer].setdefault(entry.seq_id, [])
        r = keys.positions(entry.start + entry.num_tokens)
        done = 0
        while done < entry.num_tokens:
            if (at + done) // PAGE == len(sums):
                shape = (self._checker.config.num_kv_heads, REPETITIONS, self._checker.config.head_dim)
                sums.append(np.zeros(shape, np.uint64))
            n = min(PAGE - (at + done) % PAGE, entry.num_tokens - done)
            part = np.ascontiguousarray(k_i8[done : done + n])
            key_projection(part, r, entry.start + done, sums[(at + done) // PAGE])
            done += n

    def layer(self, layer: int) -> PagedCache:
        return self._layers[layer]

    def challenge_sum(self, layer: int, seq_id: int, blocks: int, resident: U64) -> U64:
        """sum_j r_j k_j over the resident keys and the first blocks, mod p, (kv_heads, 2, d)."""
        total = resident.copy()
        for block in self._block_sums[layer].get(seq_id, [])[:blocks]:
            total = (total + block) % self._checker.prime
        return total

    def free(self, seq_id: int) -> None:
        for cache, sums in zip(self._layers, self._block_sums, strict=True):
            cache.free(seq_id)
            for block in sums.pop(seq_id, []):
                block[...] = 0

    def close(self) -> None:
        """Overwrite and drop everything."""
        for seq_id in {s for layer in self._layers for s in layer.sequences()}:
            self.free(seq_id)

    @property
    def nbytes(self) -> int:
        sums = sum(s.nbytes for layer in self._block_sums for blocks in layer.values() for s in blocks)
        return sum(c.nbytes for c in self._layers) + sums


def key_bytes(config: ModelConfig) -> int:
    """Memory of one key position over all layers: k, v, scale and g."""
    return config.num_layers * config.num_kv_heads * (2 * config.head_dim + 4 + 8 * REPETITIONS)


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
        max_bytes: int | None,
        *,
        by_weights: bool = False,
        shield: Shield | None = None,
    ) -> None:
        self._shield = shield
        self._checker, self._channel, self._sender = checker, channel, sender
        self._send = sender.send
        self._by_weights = by_weights
        self.limits: dict[int, int] = {}
        self.cache = OverflowCache(checker, max_bytes)
        self.stats = SplitStats()
        self._fixed = ratio
        self.controller = Controller(0.5 if ratio is None else ratio)
        self._step: list[Measurement] = []
        self._positions: U64 = np.empty((REPETITIONS, 0), np.uint64)

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
        self.controller = Controller()

    @property
    def ratio(self) -> float:
        """The share of the non-resident keys that is streamed in this step."""
        return self.controller.ratio if self._fixed is None else self._fixed

    def end_step(self) -> None:
        """Let the controller see what the step's layers took; the decision is in the trace."""
        if not self._step:
            return
        total = Measurement(
            sum(m.prover_keys for m in self._step),
            sum(m.prover_s for m in self._step),
            sum(m.tee_keys for m in self._step),
            sum(m.tee_s for m in self._step),
        )
        self.stats.ratios.append(self.ratio)
        self.stats.tee_bytes = max(self.stats.tee_bytes, self.cache.nbytes)
        if self._fixed is None:
            self.controller = self.controller.update(total)
        self._step.clear()
        trace = self._checker.trace
        if trace.enabled:
            now = time.monotonic()
            trace.add("replay", now, now, f"offload ratio {self.stats.ratios[-1]:.3f}, next {self.ratio:.3f}")

    def _receive(self, out: npt.NDArray[np.generic]) -> float:
        t = time.monotonic()
        self._channel.recv(Kind.CLAIM, out.nbytes, out)
        waited = time.monotonic() - t
        self._checker.counts.receive_s += waited
        return waited

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
        for entry, at in zip(batch.entries, batch.slices(), strict=True):
            if entry.seq_id in split:
                part = AttentionInput(x.q_i8[at], x.q_scale[at], x.k_i8[at], x.k_scale[at], x.v_i8[at])
                shared = self._weigh if self._by_weights else self._share
                o[at], row_sum[at] = shared(layer, entry, part, mediated)
        self._sender.flush()
        return o, row_sum

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
        began = time.monotonic()
        if share or not mediated:
            self._send(Kind.SPLIT, encode_split(request))
        self._stream_keys(layer, entry.seq_id, streamed)
        trace = checker.trace
        trace.label = f"layers.{layer}.attention.{entry.seq_id}"
        busy = -time.monotonic()
        with trace.span("replay", f"{trace.label}, own scores"):
            row_max = own.maximum()
        busy += time.monotonic()
        waited = 0.0
        if share:
            claimed_scores = np.empty((q_i8.shape[1], entry.num_tokens, share), np.int32)
            waited += self._receive(claimed_scores)
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
        busy -= time.monotonic()
        with trace.span("replay", f"{trace.label}, own share"):
            o, own_sum = own.attention(row_max)
        busy += time.monotonic()
        if not mediated:
            self._send(Kind.SHARE, [o, own_sum])
        if share:
            claimed_o = np.empty(o.shape, np.int64)
            waited += self._receive(claimed_o)
            claimed_o = self._restored(layer, entry, claimed_o)
            checker.outputs(layer, entry.seq_id, entry.start, claimed_o, pg)
            o, own_sum = o + claimed_o, own_sum + row_sum
        self._account(layer, entry, limit, streamed, busy, time.monotonic() - began - busy, waited)
        return o, own_sum

    def _account(
        self, layer: int, entry: BatchEntry, limit: int, streamed: int, busy: float, other: float, waited: float
    ) -> None:
        ours = entry.start + entry.num_tokens - limit - streamed
        if layer == 0:
            self.stats.prover_tokens += limit
            self.stats.streamed_tokens += streamed
            self.stats.tee_tokens += ours
        # The prover works while we do; what it took is our own work plus the time that we then still waited.
        prover_s = busy + waited if waited > 0.05 * busy else max(other, 0.0)
        self._step.append(Measurement(streamed, prover_s, ours, busy))

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
        if layer == 0:
            self.stats.prover_tokens += limit
            self.stats.streamed_tokens += streamed
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
        """Challenges of the first positions in one piece; kept, since all layers of a step ask for the same."""
        if self._positions.shape[1] != keys:
            self._positions[...] = 0
            self._positions = np.ascontiguousarray(self._checker.keys.positions(keys)[:, :keys])
        return self._positions

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
            k = np.ascontiguousarray(a["k"][page, :, :count].swapaxes(0, 1))
            if self._shield is not None:
                k = self._shield.layer(layer, seq_id).qk.apply(k)
            scale = np.ascontiguousarray(a["k_scale"][page, :, :count].T)
            self._send(Kind.BLOCK, encode_key_block(k, scale))

    def _stream_values(self, layer: int, seq_id: int, streamed: int) -> None:
        cache = self.cache.layer(layer)
        for page, count in zip(cache.table(seq_id), block_sizes(streamed), strict=False):
            v = np.ascontiguousarray(cache.arrays["v"][page, :, :count].swapaxes(0, 1))
            if self._shield is not None:
                v = self._shield.layer(layer, seq_id).v.apply(v)
            self._send(Kind.BLOCK, encode_value_block(v))

    def free(self, seq_id: int) -> None:
        self.limits.pop(seq_id, None)
        self.cache.free(seq_id)

    def close(self) -> None:
        """Overwrite all state that depends on secrets."""
        self._positions[...] = 0
        self.cache.close()
