"""Messages of split attention: a row shared between the prover's keys and the verifier's (docs/wire.md section 8)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from veriattn.spec.kv import PAGE
from veriattn.spec.model import ModelConfig
from veriattn.wire.messages import BadRequest, Buffer, Limits, byte_view

_SPLIT = struct.Struct("<QIIIIII")  # seq_id, layer, rows, resident, streamed, weights, queries
_BLOCK = struct.Struct("<IIQ")  # count, values, padding

#: Keys of one streamed block; the prover's buffer never holds more.
BLOCK_KEYS = PAGE


@dataclass(frozen=True, slots=True)
class SplitRequest:
    """Attend over the first `resident` cached keys and over `streamed` keys that follow in blocks.

    with_weights: the verifier sends P (tsdp) instead of row maxima. q_i8 (rows, heads, d) and q_scale (rows, heads) are None
    where the prover has computed them itself (run-ahead).
    """

    seq_id: int
    layer: int
    rows: int
    resident: int
    streamed: int
    with_weights: bool
    q_i8: npt.NDArray[np.int8] | None
    q_scale: npt.NDArray[np.float32] | None


def encode_split(request: SplitRequest) -> list[Buffer]:
    """Payload pieces of SPLIT."""
    r = request
    head = _SPLIT.pack(r.seq_id, r.layer, r.rows, r.resident, r.streamed, r.with_weights, r.q_i8 is not None)
    return [head] if r.q_i8 is None or r.q_scale is None else [head, r.q_scale, r.q_i8]


def decode_split(payload: Buffer, config: ModelConfig, limits: Limits) -> SplitRequest:
    """Prover side. Raises: BadRequest."""
    raw = byte_view(payload)
    if len(raw) < _SPLIT.size:
        raise BadRequest("SPLIT is too short")
    seq_id, layer, rows, resident, streamed, weights, queries = _SPLIT.unpack_from(raw)
    if (
        layer >= config.num_layers
        or not 1 <= rows <= limits.max_tokens_per_step
        or resident + streamed > limits.max_positions
        or weights > 1
        or queries > 1
    ):
        raise BadRequest("SPLIT is out of range")
    heads, d = config.num_heads, config.head_dim
    if len(raw) != _SPLIT.size + queries * rows * heads * (4 + d):
        raise BadRequest("SPLIT has another length than its counts say")
    q_i8 = q_scale = None
    if queries:
        q_scale = np.frombuffer(raw, "<f4", rows * heads, _SPLIT.size).reshape(rows, heads)
        q_i8 = np.frombuffer(raw, np.int8, offset=_SPLIT.size + 4 * rows * heads).reshape(rows, heads, d)
    return SplitRequest(seq_id, layer, rows, resident, streamed, bool(weights), q_i8, q_scale)


def encode_key_block(k_i8: npt.NDArray[np.int8], k_scale: npt.NDArray[np.float32]) -> list[Buffer]:
    """Payload pieces of a BLOCK of keys. Shapes: (kv_heads, count, d), (kv_heads, count), as pages have them."""
    return [_BLOCK.pack(k_i8.shape[1], 0, 0), k_scale, k_i8]


def encode_value_block(v_i8: npt.NDArray[np.int8]) -> list[Buffer]:
    """Payload pieces of a BLOCK of values, (kv_heads, count, d)."""
    return [_BLOCK.pack(v_i8.shape[1], 1, 0), v_i8]


def block_bytes(config: ModelConfig) -> int:
    """Largest payload of a BLOCK."""
    return _BLOCK.size + BLOCK_KEYS * config.num_kv_heads * (config.head_dim + 4)


def max_split_bytes(config: ModelConfig, limits: Limits) -> int:
    """Largest payload of any message of split attention under the limits."""
    rows, heads, d = limits.max_tokens_per_step, config.num_heads, config.head_dim
    queries = _SPLIT.size + rows * heads * (4 + d)
    normaliser = max(4 * rows * heads, 2 * rows * heads * limits.max_positions)
    return max(queries, block_bytes(config), normaliser, rows * heads * (8 * d + 4))


def _decode_block(payload: Buffer, count: int, values: int, size: int) -> memoryview:
    raw = byte_view(payload)
    if len(raw) != _BLOCK.size + size or _BLOCK.unpack_from(raw) != (count, values, 0):
        raise BadRequest("BLOCK is not the expected one")
    return raw


def decode_key_block(
    payload: Buffer, count: int, config: ModelConfig
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Prover side: the next block of keys, whose size follows from SPLIT. Raises: BadRequest."""
    kv, d = config.num_kv_heads, config.head_dim
    raw = _decode_block(payload, count, 0, count * kv * (4 + d))
    k_scale = np.frombuffer(raw, "<f4", count * kv, _BLOCK.size).reshape(kv, count)
    return np.frombuffer(raw, np.int8, offset=_BLOCK.size + 4 * count * kv).reshape(kv, count, d), k_scale


def decode_value_block(payload: Buffer, count: int, config: ModelConfig) -> npt.NDArray[np.int8]:
    """Prover side: the next block of values. Raises: BadRequest."""
    kv, d = config.num_kv_heads, config.head_dim
    raw = _decode_block(payload, count, 1, count * kv * d)
    return np.frombuffer(raw, np.int8, offset=_BLOCK.size).reshape(kv, count, d)


def block_sizes(streamed: int) -> list[int]:
    """Keys of each block: full ones, then the rest."""
    return [min(BLOCK_KEYS, streamed - i) for i in range(0, streamed, BLOCK_KEYS)]


def decode_array(payload: Buffer, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """Prover side: a payload that is one array of known shape. Raises: BadRequest."""
    raw = byte_view(payload)
    want = np.dtype(dtype)
    if len(raw) != want.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise BadRequest("a message of split attention has another length than expected")
    return np.frombuffer(raw, want).reshape(shape)
