"""Messages of the TEE-mediated strategies, which ask for one operation at a time (docs/wire.md section 7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from veriattn.spec.model import ModelConfig
from veriattn.wire.messages import BadRequest, Buffer, Limits, byte_view

_LINEAR = struct.Struct("<IIII")  # index, rows, padding
_ATTEND = struct.Struct("<IIIIIIII")  # layer, first_kv_head, num_kv_heads, reply, row_tile, num_entries, total, padding
_ENTRY = struct.Struct("<QII")  # seq_id, start, num_tokens
_LOAD = struct.Struct("<IIII")  # index, first_row, rows, padding
_WEIGHTS = struct.Struct("<QIIII")  # seq_id, layer, rows, keys, padding


class Reply(IntEnum):
    """What the prover answers to ATTEND."""

    OUTPUTS = 0
    SCORES_AND_OUTPUTS = 1
    SCORES = 2


@dataclass(frozen=True, slots=True)
class Run:
    """A run of new tokens of one sequence."""

    seq_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LinearRequest:
    """a_i8: (rows, in features of linear number `index` in the order of `ModelConfig.linear_shapes`)."""

    index: int
    a_i8: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class AttendRequest:
    """New keys and values of some KV heads of a layer, and the queries to attend with.

    Shapes with T tokens, n KV heads, g query heads per KV head: q (T, n * g, d), q_scale (T, n * g), k and v (T, n, d),
    k_scale (T, n). row_tile: rows of a run that are answered at a time.
    """

    layer: int
    first_kv_head: int
    num_kv_heads: int
    reply: Reply
    row_tile: int
    runs: tuple[Run, ...]
    q_i8: npt.NDArray[np.int8]
    q_scale: npt.NDArray[np.float32]
    k_i8: npt.NDArray[np.int8]
    k_scale: npt.NDArray[np.float32]
    v_i8: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class WeightsRequest:
    """Attention weights of all heads of one run, to be multiplied with the values. p_u16: (heads, rows, keys)."""

    layer: int
    seq_id: int
    p_u16: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Rows of linear number `index` that the prover uses in place of the model's. w_i8: (rows, in features)."""

    index: int
    first_row: int
    w_i8: npt.NDArray[np.int8]


#: Most bytes of rows in one LOAD.
LOAD_BYTES = 1 << 20


def encode_load(request: LoadRequest) -> list[Buffer]:
    """Payload pieces of LOAD."""
    return [_LOAD.pack(request.index, request.first_row, request.w_i8.shape[0], 0), request.w_i8]


def decode_load(payload: Buffer, config: ModelConfig) -> LoadRequest:
    """Prover side. Raises: BadRequest."""
    raw = byte_view(payload)
    if len(raw) < _LOAD.size:
        raise BadRequest("LOAD is too short")
    index, first, rows, padding = _LOAD.unpack_from(raw)
    shapes = list(config.linear_shapes().values())
    if padding or index >= len(shapes) or not 1 <= rows <= shapes[index][0] - first:
        raise BadRequest("LOAD is out of range")
    width = shapes[index][1]
    if len(raw) != _LOAD.size + rows * width:
        raise BadRequest("LOAD has another length than its counts say")
    return LoadRequest(index, first, np.frombuffer(raw, np.int8, offset=_LOAD.size).reshape(rows, width))


def max_request_bytes(config: ModelConfig, limits: Limits) -> int:
    """Largest payload of a request under the limits."""
    t, widest = limits.max_tokens_per_step, max(i for _, i in config.linear_shapes().values())
    linear = _LINEAR.size + t * widest
    heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
    attend = _ATTEND.size + limits.max_sequences * _ENTRY.size + t * ((heads + 2 * kv) * d + 4 * (heads + kv))
    weights = _WEIGHTS.size + 2 * heads * t * limits.max_positions
    load = _LOAD.size + max(LOAD_BYTES, widest)
    return max(linear, attend, weights, load)


def encode_linear(request: LinearRequest) -> list[Buffer]:
    """Payload pieces of LINEAR."""
    return [_LINEAR.pack(request.index, request.a_i8.shape[0], 0, 0), request.a_i8]


def decode_linear(payload: Buffer, config: ModelConfig, limits: Limits) -> LinearRequest:
    """Prover side. Raises: BadRequest."""
    raw = byte_view(payload)
    if len(raw) < _LINEAR.size:
        raise BadRequest("LINEAR is too short")
    index, rows, *padding = _LINEAR.unpack_from(raw)
    shapes = list(config.linear_shapes().values())
    if any(padding) or index >= len(shapes) or not 1 <= rows <= limits.max_tokens_per_step:
        raise BadRequest("LINEAR is out of range")
    width = shapes[index][1]
    if len(raw) != _LINEAR.size + rows * width:
        raise BadRequest("LINEAR has another length than its counts say")
    return LinearRequest(index, np.frombuffer(raw, np.int8, offset=_LINEAR.size).reshape(rows, width))


def encode_attend(request: AttendRequest) -> list[Buffer]:
    """Payload pieces of ATTEND: floats first, so that everything is aligned."""
    total = request.q_i8.shape[0]
    head = _ATTEND.pack(
        request.layer,
        request.first_kv_head,
        request.num_kv_heads,
        request.reply,
        request.row_tile,
        len(request.runs),
        total,
        0,
    )
    entries = b"".join(_ENTRY.pack(r.seq_id, r.start, r.num_tokens) for r in request.runs)
    return [head + entries, request.q_scale, request.k_scale, request.q_i8, request.k_i8, request.v_i8]


def decode_attend(payload: Buffer, config: ModelConfig, limits: Limits) -> AttendRequest:
    """Prover side. Raises: BadRequest."""
    raw = byte_view(payload)
    if len(raw) < _ATTEND.size:
        raise BadRequest("ATTEND is too short")
    layer, first, count, reply, tile, num_entries, total, padding = _ATTEND.unpack_from(raw)
    if (
        padding
        or layer >= config.num_layers
        or not 1 <= count <= config.num_kv_heads - first
        or reply > Reply.SCORES
        or not 1 <= tile <= limits.max_tokens_per_step
        or not 1 <= num_entries <= limits.max_sequences
        or not 1 <= total <= limits.max_tokens_per_step
    ):
        raise BadRequest("ATTEND is out of range")
    d, queries = config.head_dim, count * (config.num_heads // config.num_kv_heads)
    at = _ATTEND.size + num_entries * _ENTRY.size
    floats, bytes_ = total * (queries + count), total * d * (queries + 2 * count)
    if len(raw) != at + 4 * floats + bytes_:
        raise BadRequest("ATTEND has another length than its counts say")
    runs = tuple(Run(*_ENTRY.unpack_from(raw, _ATTEND.size + i * _ENTRY.size)) for i in range(num_entries))
    if (
        sum(r.num_tokens for r in runs) != total
        or len({r.seq_id for r in runs}) != num_entries
        or any(r.num_tokens < 1 or r.start + r.num_tokens > limits.max_positions for r in runs)
    ):
        raise BadRequest("ATTEND has bad runs")
    scales = np.frombuffer(raw, "<f4", floats, at)
    values = np.frombuffer(raw, np.int8, bytes_, at + 4 * floats)
    q, k, v = np.split(values, [total * queries * d, total * (queries + count) * d])
    return AttendRequest(
        layer,
        first,
        count,
        Reply(reply),
        tile,
        runs,
        q.reshape(total, queries, d),
        scales[: total * queries].reshape(total, queries),
        k.reshape(total, count, d),
        scales[total * queries :].reshape(total, count),
        v.reshape(total, count, d),
    )


def encode_weights(request: WeightsRequest) -> list[Buffer]:
    """Payload pieces of WEIGHTS."""
    _, rows, keys = request.p_u16.shape
    return [_WEIGHTS.pack(request.seq_id, request.layer, rows, keys, 0), request.p_u16]


def decode_weights(payload: Buffer, config: ModelConfig, limits: Limits) -> WeightsRequest:
    """Prover side. Raises: BadRequest."""
    raw = byte_view(payload)
    if len(raw) < _WEIGHTS.size:
        raise BadRequest("WEIGHTS is too short")
    seq_id, layer, rows, keys, padding = _WEIGHTS.unpack_from(raw)
    if (
        padding
        or layer >= config.num_layers
        or not 1 <= rows <= limits.max_tokens_per_step
        or not rows <= keys <= limits.max_positions
    ):
        raise BadRequest("WEIGHTS is out of range")
    if len(raw) != _WEIGHTS.size + 2 * config.num_heads * rows * keys:
        raise BadRequest("WEIGHTS has another length than its counts say")
    p = np.frombuffer(raw, "<u2", offset=_WEIGHTS.size).reshape(config.num_heads, rows, keys)
    return WeightsRequest(layer, seq_id, p)


def row_tiles(num_tokens: int, tile: int) -> list[slice]:
    """Rows of a run in the order in which they are answered."""
    return [slice(i, min(i + tile, num_tokens)) for i in range(0, num_tokens, tile)]
