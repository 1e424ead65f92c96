"""The prover's part of split attention: its own keys and those that are streamed to it, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    def answer(
        self, request: SplitRequest, local: LocalOperations, q_i8: I8, q_scale: F32, sink: ClaimSink
    ) -> tuple[I64, I32]:
        """Claim scores and outputs of the share; returns O and L of the share (L is 0 where the verifier sends weights).

        Raises: BadRequest for keys that are not there or messages out of order.
        """
        r, c = request, self._config
        rows, heads = q_i8.shape[:2]
        if local.layer_length(r.layer, r.seq_id) < r.resident:
            raise BadRequest(f"sequence {r.seq_id} has fewer keys in layer {r.layer}")
        if r.resident + r.streamed == 0:
            return np.zeros(q_i8.shape, np.int64), np.zeros((rows, heads), np.int32)
        name = f"layers.{r.layer}.{{}}.{r.seq_id}"
        a, table = local.pages(r.layer, r.seq_id)
        scores_i32 = np.empty((heads, rows, r.resident + r.streamed), np.int32)
        share_scores_into(scores_i32, 0, r.resident, q_i8, a["k"], table)
        at, scales = r.resident, []
        for count in block_sizes(r.streamed):
            k_block, scale = decode_key_block(self._receive(Kind.BLOCK), count, c)
            share_scores_into(scores_i32, at, count, q_i8, k_block)
            scales.append(scale)
            at += count
        sink.claim(name.format("scores"), scores_i32)
        payload = self._receive(Kind.NORMALISER)
        if r.with_weights:
            p_u16 = decode_array(payload, "<u2", scores_i32.shape).astype(np.uint16)
            row_sums = np.zeros((rows, heads), np.int32)
        else:
            row_max = decode_array(payload, "<f4", (rows, heads)).astype(np.float32)
            p_u16, row_sums = np.empty(scores_i32.shape, np.uint16), np.zeros((rows, heads), np.int32)
            own = (0, r.resident, a["k_scale"], table)
            streamed = (
                r.resident,
                r.streamed,
                np.concatenate([np.empty((0, c.num_kv_heads), np.float32), *scales]),
                None,
            )
            for at, count, k_scale, where in (own, streamed):
                share_weights_into(p_u16, row_sums, None, scores_i32, at, count, q_scale, k_scale, row_max, None, where)
        at, o = r.resident, np.zeros(q_i8.shape, np.int64)
        share_outputs_into(o, p_u16, 0, at, a["v"], table)
        for count in block_sizes(r.streamed):
            v_block = decode_value_block(self._receive(Kind.BLOCK), count, c)
            share_outputs_into(o, p_u16, at, count, v_block)
            at += count
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
