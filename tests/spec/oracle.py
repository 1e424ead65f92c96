"""The canonical function once more, from docs/spec.md alone: one number at a time, plain Python, no NumPy.

A Python float is binary64. For one + - * / or sqrt of binary32 operands, rounding the binary64 result to binary32 is the
same as rounding once (53 >= 2 * 24 + 2), so `fl` after each operation *is* binary32 arithmetic. Vectors are lists.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any

Vector = list[float]

FLOOR, LIMIT = 2.0**-20, 2.0**40
MIN_NORMAL = 2.0**-126
EXP2 = [
    float.fromhex(c)
    for c in (
        "0x1.41a6fcp-13",
        "0x1.5f44f0p-10",
        "0x1.3b2dfep-7",
        "0x1.c6aed6p-5",
        "0x1.ebfbdap-3",
        "0x1.62e430p-1",
        "1",
    )
]
LOG2E = float.fromhex("0x1.715476p+0")


class OutsideDomain(Exception):
    """The function is undefined here."""


class Subnormal(Exception):
    """An intermediate value that a device might flush to zero."""


def fl(x: float) -> float:
    """Round to binary32. Raises: Subnormal, OutsideDomain for what must never come up."""
    try:
        y: float = struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        raise OutsideDomain("overflow") from None
    if math.isnan(y) or math.isinf(y):
        raise OutsideDomain("not finite")
    if x != 0 and abs(y) < MIN_NORMAL:
        raise Subnormal(x.hex())
    return y


def rint(x: float) -> float:
    return float(round(x))


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def i8(z: float) -> int:
    return int(clamp(rint(z), -127.0, 127.0))


def lut() -> list[int]:
    with localcontext() as context:
        context.prec = 50
        return [
            int((Decimal("32672.25") * Decimal(2) ** (Decimal(-f) / 64)).to_integral_value("ROUND_HALF_EVEN"))
            for f in range(64)
        ]


LUT = lut()


def absmax(x: Sequence[float]) -> float:
    if any(not abs(v) < LIMIT for v in x):
        raise OutsideDomain("absmax")
    return max([FLOOR, *(abs(v) for v in x)])


def quantise(x: Sequence[float]) -> tuple[list[int], float]:
    a = absmax(x)
    inverse = fl(127.0 / a)
    return [i8(fl(v * inverse)) for v in x], fl(a / 127.0)


def rms(x: Sequence[float], eps: float) -> tuple[list[int], float, float, float]:
    """b, A, step, rstd."""
    a = absmax(x)
    inverse = fl(32767.0 / a)
    b = [int(clamp(rint(fl(v * inverse)), -32767.0, 32767.0)) for v in x]
    step = fl(a / 32767.0)
    mean = fl(fl(float(sum(v * v for v in b))) / float(len(x)))
    var = fl(mean * fl(step * step))
    return b, a, step, fl(1.0 / fl(math.sqrt(fl(var + eps))))


def norm_quantise(x: Sequence[float], eps: float) -> tuple[list[int], float]:
    _, a, _, rstd = rms(x, eps)
    q, _ = quantise(x)
    return q, fl(fl(a / 127.0) * rstd)


def head_norm(x: Sequence[float], weight: Sequence[float], eps: float) -> Vector:
    b, _, step, rstd = rms(x, eps)
    factor = fl(step * rstd)
    return [fl(fl(float(v) * factor) * w) for v, w in zip(b, weight, strict=True)]


def dequantise(
    y: Sequence[int], w_scale: Sequence[float], a_scale: float, bias: Sequence[float] | None = None
) -> Vector:
    v = [fl(fl(fl(float(n)) * s) * a_scale) for n, s in zip(y, w_scale, strict=True)]
    return v if bias is None else [fl(n + b) for n, b in zip(v, bias, strict=True)]


def linear(a: Sequence[int], w: Sequence[Sequence[int]]) -> list[int]:
    return [sum(p * q for p, q in zip(a, row, strict=True)) for row in w]


def rotary(x: Sequence[float], cos: Sequence[float], sin: Sequence[float]) -> Vector:
    out, half = list(x), len(cos)
    for i, (c, s) in enumerate(zip(cos, sin, strict=True)):
        x1, x2 = x[i], x[i + half]
        out[i] = fl(fl(x1 * c) - fl(x2 * s))
        out[i + half] = fl(fl(x2 * c) + fl(x1 * s))
    return out


def block_size(n: int) -> int:
    h = 1
    while n % (2 * h) == 0:
        h *= 2
    return h


def hadamard(x: Sequence[float], block: int) -> Vector:
    out, stride = list(x), 1
    while stride < block:
        # Pairs (j, j + stride) with bit `stride` of j clear; blocks are powers of two, so bits of the offset decide.
        for base in range(0, len(out), block):
            for j in range(block):
                if not j & stride:
                    p, q = out[base + j], out[base + j + stride]
                    out[base + j], out[base + j + stride] = fl(p + q), fl(p - q)
        stride *= 2
    return out


def query_constant(d: int) -> float:
    return fl(64 * math.log2(math.e) / math.sqrt(d) / block_size(d))


def exp2(z: float) -> float:
    z = clamp(z, -125.0, 125.0)
    n = rint(z)
    f = fl(z - n)
    p = EXP2[0]
    for c in EXP2[1:]:
        p = fl(fl(p * f) + c)
    return fl(p * 2.0**n)


def silu_times(g: float, u: float) -> float:
    z = clamp(fl(g * -LOG2E), -48.0, 48.0)
    return fl(fl(g / fl(1.0 + exp2(z))) * u)


def mlp(y: Sequence[int], a_scale: float, w_scale: Sequence[float]) -> tuple[list[int], float]:
    v = dequantise(y, w_scale, a_scale)
    n = len(v) // 2
    h = [silu_times(g, u) for g, u in zip(v[:n], v[n:], strict=True)]
    absmax(h)
    return quantise(hadamard(h, block_size(n)))


@dataclass
class Head:
    """One key/value head's cache."""

    k: list[list[int]] = field(default_factory=list)
    k_scale: list[float] = field(default_factory=list)
    v: list[list[int]] = field(default_factory=list)


def attention_row(q: Sequence[int], q_scale: float, head: Head, visible: int) -> tuple[list[int], int, list[int]]:
    """O, L and P of one query and head over the first `visible` keys."""
    t = [
        fl(fl(float(sum(a * b for a, b in zip(q, k, strict=True)))) * s)
        for k, s in zip(head.k[:visible], head.k_scale[:visible], strict=True)
    ]
    m = max(t)
    p = []
    for v in t:
        xi = int(rint(min(fl(fl(m - v) * q_scale), 960.0)))
        p.append(((LUT[xi & 63] >> (xi >> 6)) + 1) >> 1)
    o = [sum(w * v[i] for w, v in zip(p, head.v, strict=False)) for i in range(len(q))]
    return o, sum(p), p


def attention_output(
    o: Sequence[Sequence[int]], row_sum: Sequence[int], v_scale: Sequence[float]
) -> tuple[list[int], float]:
    """int8 operand of the o linear. Shapes: o (heads, d), row_sum (heads,), v_scale (kv_heads,)."""
    group = len(o) // len(v_scale)
    x = [fl(fl(fl(float(n)) / fl(float(row_sum[h]))) * v_scale[h // group]) for h, row in enumerate(o) for n in row]
    return quantise(x)


def qkv(
    y: Sequence[int],
    a_scale: float,
    w_scale: Sequence[float],
    bias: Sequence[float] | None,
    cos: Sequence[float],
    sin: Sequence[float],
    v_scale: Sequence[float],
    heads: int,
    kv_heads: int,
    d: int,
    k_center: Sequence[Sequence[float]] | None = None,
    q_norm: Sequence[float] | None = None,
    k_norm: Sequence[float] | None = None,
    eps: float = 1.0,
) -> tuple[list[list[int]], Vector, list[list[int]], Vector, list[list[int]]]:
    """Section 5 for one token: q, q_scale, k, k_scale, v per head."""
    x = dequantise(y, w_scale, a_scale, bias)
    absmax(x)
    rows = [x[i : i + d] for i in range(0, len(x), d)]
    q, q_scale, k, k_scale, v = [], [], [], [], []
    for i, row in enumerate(rows):
        if i >= heads + kv_heads:
            inverse = fl(1.0 / v_scale[i - heads - kv_heads])
            v.append([i8(clamp(fl(n * inverse), -127.0, 127.0)) for n in row])
            continue
        is_query = i < heads
        weight = q_norm if is_query else k_norm
        if weight is not None:
            row = head_norm(row, weight, eps)  # noqa: PLW2901
        row = rotary(row, cos, sin)  # noqa: PLW2901
        if not is_query and k_center is not None:
            row = [fl(n - c) for n, c in zip(row, k_center[i - heads], strict=True)]  # noqa: PLW2901
        ints, scale = quantise(hadamard(row, block_size(d)))
        if is_query:
            q.append(ints)
            q_scale.append(fl(scale * query_constant(d)))
        else:
            k.append(ints)
            k_scale.append(scale)
    return q, q_scale, k, k_scale, v


class Model:
    """The whole function over one sequence. `tensors` are nested lists under the names of docs/spec.md section 2."""

    def __init__(self, config: Any, tensors: dict[str, Any]) -> None:
        self._c, self._t, self._eps = config, tensors, fl(config.rms_eps)
        self._cache = [[Head() for _ in range(config.num_kv_heads)] for _ in range(config.num_layers)]
        self._length = 0

    def token(self, token_id: int) -> Vector:
        """Logits after one more token."""
        c, t, eps = self._c, self._t, self._eps
        x = [fl(v) for v in t["embed"][token_id]]
        at = self._length
        self._length += 1
        for i in range(c.num_layers):
            name = f"layers.{i}"
            a, a_scale = norm_quantise(x, eps)
            q, q_scale, k, k_scale, v = qkv(
                linear(a, t[f"{name}.qkv.weight"]), a_scale, t[f"{name}.qkv.scale"], t.get(f"{name}.qkv.bias"),
                t["rope.cos"][at], t["rope.sin"][at], t[f"{name}.v_scale"], c.num_heads, c.num_kv_heads, c.head_dim,
                t.get(f"{name}.k_center"), t.get(f"{name}.q_norm"), t.get(f"{name}.k_norm"), eps,
            )  # fmt: skip
            for head, key, scale, value in zip(self._cache[i], k, k_scale, v, strict=True):
                head.k.append(key)
                head.k_scale.append(scale)
                head.v.append(value)
            group = c.num_heads // c.num_kv_heads
            rows = [attention_row(q[h], q_scale[h], self._cache[i][h // group], at + 1) for h in range(c.num_heads)]
            a, a_scale = attention_output([r[0] for r in rows], [r[1] for r in rows], t[f"{name}.v_scale"])
            x = self._residual(x, a, a_scale, f"{name}.o")
            a, a_scale = norm_quantise(x, eps)
            a, a_scale = mlp(linear(a, t[f"{name}.gate_up.weight"]), a_scale, t[f"{name}.gate_up.scale"])
            x = self._residual(x, a, a_scale, f"{name}.down")
        a, a_scale = norm_quantise(x, eps)
        return dequantise(linear(a, t["lm_head.weight"]), t["lm_head.scale"], a_scale)

    def _residual(self, x: Vector, a: Sequence[int], a_scale: float, name: str) -> Vector:
        v = dequantise(linear(a, self._t[f"{name}.weight"]), self._t[f"{name}.scale"], a_scale)
        return [fl(p + q) for p, q in zip(x, v, strict=True)]


def sample(
    logits: Sequence[float],
    params: Any,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    position: int,
    choice: int = 0,
    fl: Callable[[float], float] = fl,
) -> int:
    """Section 10, by sorting everything."""
    x = list(logits)
    if params.repetition_penalty != 1:
        rep = fl(params.repetition_penalty)
        for i in {*prompt_ids, *output_ids}:
            x[i] = fl(x[i] / rep) if x[i] > 0 else fl(x[i] * rep)
    if params.frequency_penalty != 0 or params.presence_penalty != 0:
        frequency, presence = fl(params.frequency_penalty), fl(params.presence_penalty)
        for i in set(output_ids):
            x[i] = fl(fl(x[i] - fl(frequency * float(output_ids.count(i)))) - presence)
    for i, bias in params.logit_bias:
        x[i] = fl(x[i] + fl(bias))
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if params.temperature == 0:
        return order[0]
    top, scale = x[order[0]], fl(LOG2E / fl(params.temperature))
    w = {i: int(rint(fl(exp2(max(fl(fl(x[i] - top) * scale), -64.0)) * 2.0**30))) for i in order}
    left = [i for i in order if 4 * w[i] >= math.floor(params.min_p * 2**32)]
    if params.top_k:
        left = left[: params.top_k]
    q = math.floor(params.top_p * 2**32)
    if q < 2**32:
        need, so_far, kept = -(-q * sum(w[i] for i in left) // 2**32), 0, []
        for i in left:
            kept.append(i)
            so_far += w[i]
            if so_far >= need:
                break
        left = kept
    message = b"veriattn/sampler/1" + struct.pack("<QQQ", params.seed % 2**64, position, choice)
    u = int.from_bytes(hashlib.sha256(message).digest()[:8], "little")
    target, so_far = u * sum(w[i] for i in left) >> 64, 0
    for i in sorted(left):
        so_far += w[i]
        if so_far > target:
            return i
    raise AssertionError("the weights sum to less than their sum")
