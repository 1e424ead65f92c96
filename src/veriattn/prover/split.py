"""The prover's part of split attention: its own keys and those that are streamed to it, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from veriattn.errors import InternalError
from veriattn.native.partial import share_outputs_into, share_scores_into, share_weights_into
from veriattn.prover.backend import ClaimSink
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import ModelConfig
from veriattn.spec.reference import F32, I8, I32, I64
from veriattn.wire.channel import Channel
from veriattn.wire.messages import BadRequest, Kind, Limits
from veriattn.wire.split import (
    SplitRequest,
    block_sizes,
    decode_array,
    decode_key_block,
    decode_split,
    decode_value_block,
    max_split_bytes,
)

U16 = npt.NDArray[np.uint16]
Q_contra = TypeVar("Q_contra", contravariant=True)


class Share(Protocol[Q_contra]):
    """Computes one share, in the order of docs/wire.md section 8. Queries come in the form that the backend keeps them in."""

    def cached(self, layer: int, seq_id: int) -> int:
        """Keys of a sequence that are kept here."""
        ...

    def begin(self, request: SplitRequest, q_i8: Q_contra, q_scale: Q_contra) -> None:
        """A new share. Shapes: q (rows, heads, d), q_scale (rows, heads)."""
        ...

    def resident_scores(self) -> None: ...

    def block_scores(self, at: int, k_i8: I8, k_scale: F32) -> None:
        """Scores of streamed keys, to stand from column `at`. Shapes: (kv_heads, count, d), (kv_heads, count)."""
        ...

    def scores(self) -> I32:
        """(heads, rows, keys of the share)."""
        ...

    def weights(self, p_u16: U16) -> None:
        """Use these P."""
        ...

    def row_max(self, row_max: F32) -> None:
        """Use P relative to these maxima, (rows, heads)."""
        ...

    def resident_outputs(self) -> None: ...

    def block_outputs(self, at: int, v_i8: I8) -> None:
        """Add the part of streamed values, (kv_heads, count, d)."""
        ...

    def outputs(self) -> tuple[I64, I32]:
        """O and L; L is 0 after `weights`."""
        ...


class CpuShare:
    """A share over native kernels and a cache in this process's memory."""

    def __init__(self, local: LocalOperations) -> None:
        self._local = local

    def cached(self, layer: int, seq_id: int) -> int:
        return self._local.layer_length(layer, seq_id)

    def begin(self, request: SplitRequest, q_i8: np.ndarray[Any, Any], q_scale: np.ndarray[Any, Any]) -> None:
        r = self._request = request
        rows, heads = q_i8.shape[:2]
        self._q_i8, self._q_scale = q_i8, q_scale
        self._pages, self._table = self._local.pages(r.layer, r.seq_id)
        self._scores = np.empty((heads, rows, r.resident + r.streamed), np.int32)
        self._scales: list[F32] = []
        self._p: U16 | None = None
        self._o, self._sums = np.zeros(q_i8.shape, np.int64), np.zeros((rows, heads), np.int32)

    def resident_scores(self) -> None:
        share_scores_into(self._scores, 0, self._request.resident, self._q_i8, self._pages["k"], self._table)

    def block_scores(self, at: int, k_i8: I8, k_scale: F32) -> None:
        share_scores_into(self._scores, at, k_i8.shape[1], self._q_i8, k_i8)
        self._scales.append(k_scale)

    def scores(self) -> I32:
        return self._scores

    def weights(self, p_u16: U16) -> None:
        self._p = p_u16

    def row_max(self, row_max: F32) -> None:
        r, p = self._request, np.empty(self._scores.shape, np.uint16)
        kv_heads = self._pages["k_scale"].shape[1]
        streamed = np.concatenate([np.empty((kv_heads, 0), np.float32), *self._scales], axis=1)
        own = (0, r.resident, self._pages["k_scale"], self._table)
        for at, count, k_scale, where in (own, (r.resident, r.streamed, streamed, None)):
            share_weights_into(
                p, self._sums, None, self._scores, at, count, self._q_scale, k_scale, row_max, None, where
            )
        self._p = p

    def resident_outputs(self) -> None:
        self._add(0, self._request.resident, self._pages["v"], self._table)

    def block_outputs(self, at: int, v_i8: I8) -> None:
        self._add(at, v_i8.shape[1], v_i8, None)

    def _add(self, at: int, count: int, v_i8: I8, table: I32 | None) -> None:
        if self._p is None:
            raise InternalError("outputs before weights")
        share_outputs_into(self._o, self._p, at, count, v_i8, table)

    def outputs(self) -> tuple[I64, I32]:
        return self._o, self._sums


class SplitProver:
    """Answers SPLIT requests. Streamed keys and values live for one block, so memory does not grow with the share."""

    def __init__(self, channel: Channel, config: ModelConfig, limits: Limits) -> None:
        self._channel, self._config, self._limits = channel, config, limits
        self._bytes = max_split_bytes(config, limits)

    def _receive(self, kind: Kind) -> memoryview:
        got, payload = self._channel.recv_any(self._limits, operation_bytes=self._bytes)
        if got is not kind:
            raise BadRequest(f"{got.name} in place of {kind.name}")
        return payload

    def request(self) -> SplitRequest:
        """The next message, which must be a SPLIT."""
        return decode_split(self._receive(Kind.SPLIT), self._config, self._limits)

    def exchanges(self, seq_id: int, layer: int, rows: slice) -> Iterator[tuple[SplitRequest, slice]]:
        """The SPLITs of one run, which the verifier cuts into as many exchanges as it likes, and the rows of each.

        rows: of the run, in the batch. Raises: BadRequest for another sequence, layer or more rows.
        """
        done = rows.start
        while done < rows.stop:
            request = self.request()
            tile = slice(done, done + request.rows)
            if (request.seq_id, request.layer) != (seq_id, layer) or tile.stop > rows.stop:
                raise BadRequest("SPLIT is for another sequence, layer or number of rows")
            yield request, tile
            done = tile.stop

    def answer(
        self, request: SplitRequest, local: LocalOperations, q_i8: I8, q_scale: F32, sink: ClaimSink
    ) -> tuple[I64, I32]:
        """`exchange` over native kernels and a cache in this process's memory."""
        return self.exchange(request, CpuShare(local), q_i8, q_scale, sink)

    def exchange(
        self, request: SplitRequest, share: Share[Any], q_i8: Any, q_scale: Any, sink: ClaimSink
    ) -> tuple[I64, I32]:
        """Claim scores and outputs of the share; returns O and L of the share (L is 0 where the verifier sends weights).

        Raises: BadRequest for keys that are not there or messages out of order.
        """
        r, c = request, self._config
        if share.cached(r.layer, r.seq_id) < r.resident:
            raise BadRequest(f"sequence {r.seq_id} has fewer keys in layer {r.layer}")
        if r.resident + r.streamed == 0:
            return np.zeros((r.rows, c.num_heads, c.head_dim), np.int64), np.zeros((r.rows, c.num_heads), np.int32)
        name = f"layers.{r.layer}.{{}}.{r.seq_id}"
        share.begin(r, q_i8, q_scale)
        share.resident_scores()
        at = r.resident
        for count in block_sizes(r.streamed):
            share.block_scores(at, *decode_key_block(self._receive(Kind.BLOCK), count, c))
            at += count
        sink.claim(name.format("scores"), share.scores())
        payload = self._receive(Kind.NORMALISER)
        if r.with_weights:
            share.weights(decode_array(payload, "<u2", (c.num_heads, r.rows, at)).astype(np.uint16))
        else:
            share.row_max(decode_array(payload, "<f4", (r.rows, c.num_heads)).astype(np.float32))
        share.resident_outputs()
        at = r.resident
        for count in block_sizes(r.streamed):
            share.block_outputs(at, decode_value_block(self._receive(Kind.BLOCK), count, c))
            at += count
        o, row_sums = share.outputs()
        sink.claim(name.format("attention"), o)
        return o, row_sums

    def other_share(self, rows: int) -> tuple[I64, I32]:
        """Run-ahead: O and L of the verifier's share."""
        c = self._config
        raw = self._receive(Kind.SHARE)
        cut = 8 * rows * c.num_heads * c.head_dim
        o = decode_array(raw[:cut], "<i8", (rows, c.num_heads, c.head_dim)).astype(np.int64)
        return o, decode_array(raw[cut:], "<i4", (rows, c.num_heads)).astype(np.int32)


@dataclass(frozen=True)
class SplitStep:
    """Which sequences of a step are shared with the verifier, and the exchange with it."""

    seq_ids: frozenset[int]
    shares: SplitProver
