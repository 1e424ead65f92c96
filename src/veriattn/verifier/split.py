"""Split attention: keys that the prover cannot hold live here; some are streamed to it, the rest is computed here.

The prover's share is checked like transferred scores; our own share needs no check. Both are relative to the global row
maximum, which is taken from checked scores, so the sums are the same bits for every capacity and every split.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from veriattn.errors import AttentionMismatch, ConfigError, InternalError
from veriattn.native import key_projection, linear_check, value_projection
from veriattn.shield.permutation import Shield
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry
from veriattn.spec.kv import PAGE, PagedCache
from veriattn.spec.model import ModelConfig
from veriattn.spec.partial import (
    share_maximum,
    share_projection,
    share_sums,
    share_weights,
    tail_attention,
    tail_maximum,
)
from veriattn.spec.reference import F32, I8, I32, I64, attention_weights, causal_mask
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
    """Keys attended to, summed over steps (of one layer): resident at the prover, streamed to it, ours."""

    prover_tokens: int = 0
    streamed_tokens: int = 0
    tee_tokens: int = 0
    ratios: list[float] = field(default_factory=list)

    def to_json(self, ratio: float | None) -> dict[str, float | int | None]:
        return {
            "prover_tokens": self.prover_tokens,
            "streamed_tokens": self.streamed_tokens,
            "tee_tokens": self.tee_tokens,
            "offload_ratio": ratio,
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

    def limit(self, seq_id: int) -> int | None:
        """How many leading positions of a sequence the prover keeps; None for all."""
        return self.limits.get(seq_id)

    def is_split(self, entry: BatchEntry) -> bool:
        """Whether a run lies beyond its sequence's limit."""
        limit = self.limits.get(entry.seq_id)
        return limit is not None and entry.start >= limit

    @property
    def ratio(self) -> float:
        """The share of the non-resident keys that is streamed in this step."""
        return self.controller.ratio if self._fixed is None else self._fixed

    def end_step(self) -> None:
        """Let the controller see what the step's layers took."""
        if self._step:
            total = Measurement(
                sum(m.prover_keys for m in self._step),
                sum(m.prover_s for m in self._step),
                sum(m.tee_keys for m in self._step),
                sum(m.tee_s for m in self._step),
            )
            self.stats.ratios.append(self.ratio)
            self.controller = self.controller.update(total)
            self._step.clear()

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
        tail_table = cache.table(entry.seq_id)[streamed // PAGE :]
        a, tail_start = cache.arrays, before - streamed
        share = limit + streamed
        request = SplitRequest(
            entry.seq_id, layer, entry.num_tokens, limit, streamed, False,
            self._shown_queries(layer, entry, q_i8) if mediated else None, q_scale if mediated else None,
        )  # fmt: skip
        began = time.monotonic()
        if share or not mediated:
            self._send(Kind.SPLIT, encode_split(request))
        self._stream_keys(layer, entry.seq_id, streamed)
        busy = -time.monotonic()
        row_max = tail_maximum(q_i8, a["k"], a["k_scale"], tail_table, tail_start)
        busy += time.monotonic()
        waited = 0.0
        if share:
            claimed_scores = np.empty((q_i8.shape[1], entry.num_tokens, share), np.int32)
            waited += self._receive(claimed_scores)
            scale, g = self._share_fields(layer, entry.seq_id, limit, streamed)
            self._check_scores(layer, entry, limit, streamed, q_i8, claimed_scores)
            row_max = np.maximum(row_max, share_maximum(claimed_scores, scale))
            self._send(Kind.NORMALISER, [row_max])
            self._stream_values(layer, entry.seq_id, streamed)
            p_u16 = share_weights(claimed_scores, q_scale, scale, row_max)
            pg, row_sum = share_projection(p_u16, g), share_sums(p_u16)
        busy -= time.monotonic()
        o, own_sum = tail_attention(q_i8, q_scale, a["k"], a["k_scale"], a["v"], tail_table, tail_start, row_max)
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
        scale, g = self._share_fields(layer, entry.seq_id, limit, streamed)
        group, visible = q_i8.shape[1] // scale.shape[1], causal_mask(entry.num_tokens, entry.start, keys)
        p_u16 = np.empty(claimed_scores.shape, np.uint16)
        for h in range(q_i8.shape[1]):
            p_u16[h] = attention_weights(claimed_scores[h], q_scale[:, h], scale[:, h // group], visible)[0]
        self._send(Kind.NORMALISER, [p_u16])
        self._stream_values(layer, entry.seq_id, streamed)
        claimed_o = np.empty(q_i8.shape, np.int64)
        self._receive(claimed_o)
        claimed_o = self._restored(layer, entry, claimed_o)
        self._checker.outputs(layer, entry.seq_id, entry.start, claimed_o, share_projection(p_u16, g))
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
        r = np.ascontiguousarray(checker.keys.positions(limit + streamed)[:, : limit + streamed])
        group = q_i8.shape[1] // c.shape[0]
        for head in range(q_i8.shape[1]):
            ok = linear_check(claimed_scores[head], r, np.ascontiguousarray(q_i8[:, head]), c[head // group])
            if not bool(np.all(ok)):
                row = int(np.argmin(ok))
                raise AttentionMismatch(
                    f"layers.{layer}.attention, sequence {entry.seq_id}, position {entry.start + row}, head {head}: "
                    "the claimed scores are wrong",
                    hint=LYING,
                )

    def _share_fields(self, layer: int, seq_id: int, limit: int, streamed: int) -> tuple[F32, U64]:
        """Key scales and g of the prover's share, in its order."""
        resident, ours = self._checker.cache.layer(layer), self.cache.layer(layer)
        scale, g = (
            np.concatenate([resident.gather(seq_id, name)[:limit], ours.gather(seq_id, name)[:streamed]])
            for name in ("k_scale", "g")
        )
        return scale, g

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
        self.cache.close()
