"""What the trusted side asks of the floating-point prover: fixed headers, then arrays whose sizes follow from them."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from veriattn.convert.checkpoint import F32, SourceConfig
from veriattn.floatmode.formats import Array
from veriattn.floatmode.params import FORMATS, Format
from veriattn.wire.messages import BadRequest

Shift = Literal["max", "none"]
LINEARS = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
DEVICE_BYTES = 64

_LINEAR = struct.Struct("<III")  # layer, linear, tokens
_ATTEND = struct.Struct("<IIIIIII")  # layer, first KV head, KV heads, start, tokens, rows of a tile, streamed keys
_VALUES = struct.Struct("<II")  # layer, tokens
LINEAR_BYTES, ATTEND_BYTES, VALUES_BYTES = _LINEAR.size, _ATTEND.size, _VALUES.size


@dataclass(frozen=True)
class Hello:
    """What the prover is to be: where the checkpoint lies, in which formats it computes and answers."""

    path: str
    backend: str
    device: str
    format: Format
    exp_format: Format
    shift: Shift
    kv_tokens: int

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, payload: bytes) -> Hello:
        """Raises: BadRequest."""
        try:
            hello = cls(**json.loads(payload))
        except (ValueError, TypeError) as error:
            raise BadRequest(f"HELLO cannot be read: {error}") from error
        if hello.format not in FORMATS or hello.exp_format not in FORMATS or hello.shift not in ("max", "none"):
            raise BadRequest("HELLO asks for an unknown format")
        return hello


@dataclass(frozen=True)
class Linear:
    """y = x @ W.T. Claim: y (tokens, out) in `format`."""

    layer: int
    name: str
    x: F32

    def parts(self) -> Sequence[Any]:
        return [_LINEAR.pack(self.layer, LINEARS.index(self.name), self.x.shape[0]), self.x]

    @classmethod
    def decode(cls, payload: bytes) -> Linear:
        layer, index, tokens = _LINEAR.unpack_from(payload)
        x = np.frombuffer(payload, np.float32, offset=_LINEAR.size).reshape(tokens, -1)
        return cls(layer, LINEARS[index], x)


@dataclass(frozen=True)
class Attend:
    """Attention of a block of KV heads (or, in SCORES, its scores alone).

    The prover's share of keys is [0, min(start + tokens, capacity)) of its own cache, then `streamed` keys that come
    along and that every row sees. Claims of ATTEND, per tile of rows: shift float32 (kv, rows * group), E in `exp_format`
    (kv, keys, rows * group), keys as the tile's last row sees them; then U (kv, tokens * group, d) in `format`. Rows are
    (token, head of the group). Claims of SCORES: S in `format` (kv, keys, tokens * group), nothing masked; VALUES then
    brings weights P (kv, keys, tokens * group) and takes O = P.T V (kv, tokens * group, d).
    """

    layer: int
    first: int
    kv: int
    start: int
    tokens: int
    tile: int
    streamed: int
    q: F32
    k: F32
    v: F32
    far_k: F32
    far_v: F32

    def parts(self) -> Sequence[Any]:
        head = _ATTEND.pack(self.layer, self.first, self.kv, self.start, self.tokens, self.tile, self.streamed)
        return [head, self.q, self.k, self.v, self.far_k, self.far_v]

    @classmethod
    def decode(cls, payload: bytes, config: SourceConfig) -> Attend:
        layer, first, kv, start, tokens, tile, streamed = _ATTEND.unpack_from(payload)
        group, d = config.num_heads // config.num_kv_heads, config.head_dim
        shapes = [(kv, tokens * group, d), (kv, tokens, d), (kv, tokens, d), (kv, streamed, d), (kv, streamed, d)]
        at, arrays = _ATTEND.size, []
        for shape in shapes:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(payload, np.float32, count, at).reshape(shape))
            at += 4 * count
        return cls(layer, first, kv, start, tokens, tile, streamed, *arrays)


@dataclass(frozen=True)
class Values:
    """Attention weights of the trusted side for the scores that were claimed last."""

    layer: int
    tokens: int
    p: F32

    def parts(self) -> Sequence[Any]:
        return [_VALUES.pack(self.layer, self.tokens), self.p]

    @classmethod
    def decode(cls, payload: bytes, kv: int, group: int) -> Values:
        layer, tokens = _VALUES.unpack_from(payload)
        p = np.frombuffer(payload, np.float32, offset=_VALUES.size).reshape(kv, -1, tokens * group)
        return cls(layer, tokens, p)


def tile_mask(start: int, first: int, stop: int, keys: int, group: int) -> Array:
    """Which of `keys` keys the rows of tokens [first, stop) see, (keys, rows * group); positions from `start` on."""
    seen = np.arange(keys)[:, None] <= start + np.arange(first, stop)[None, :]
    return np.asarray(np.repeat(seen, group, axis=1))
