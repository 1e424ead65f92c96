"""Device functions that every kernel shares: rounding, absolute maxima, quantisation, the two exponentials.

Each has the bits of its counterpart in spec/reference.py. Division and root are the correctly rounded ones: `/` and
`tl.exp` are
approximations on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from veriattn.spec import constants

# Bit patterns order like the numbers they stand for, and a NaN's lies above all: integer maxima have no order and lose no NaN.
FLOOR_BITS = tl.constexpr(0x35800000)  # 2**-20
LIMIT_BITS = tl.constexpr(0x53800000)  # 2**40
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves an integer in the low bits of the significand
MAGIC_BITS = tl.constexpr(0x4B400000)
MINUS_LOG2E = tl.constexpr(-float(constants.LOG2E))
XI_MAX = tl.constexpr(float(constants.XI_MAX))
C0, C1, C2, C3, C4, C5, C6 = (tl.constexpr(float(c)) for c in constants.EXP2_COEFFICIENTS)


@triton.jit
def rint(x):
    """Nearest integer, ties to even, for |x| < 2**22; a zero comes out as +0."""
    return (x + MAGIC) - MAGIC


@triton.jit
def abs_bits(x):
    """|x| as an integer that orders like it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_flag(flag_ptr, top_bits):
    """Note that a value is not finite or is 2**40 or larger (`NumericsError` of `absmax`); whoever stores stores 1."""
    bad = tl.max(top_bits, 0) >= LIMIT_BITS
    tl.store(flag_ptr, 1, mask=bad)


@triton.jit
def floored(bits):
    """`absmax` from the largest bits of a row."""
    return tl.maximum(bits, FLOOR_BITS).to(tl.float32, bitcast=True)


@triton.jit
def over(numerator: tl.constexpr, x):
    """fl(numerator / x)."""
    return tl.div_rn(tl.full(x.shape, numerator, tl.float32), x)


@triton.jit
def by(x, denominator: tl.constexpr):
    """fl(x / denominator)."""
    return tl.div_rn(x, tl.full(x.shape, denominator, tl.float32))


@triton.jit
def round_i8(x):
    """i8(x) for |x| < 2**22."""
    return tl.minimum(tl.maximum(rint(x), -127.0), 127.0).to(tl.int8)


@triton.jit
def round_i16(x):
    """The 16-bit image of `rms_integer`, in 32 bits."""
    return tl.minimum(tl.maximum(rint(x), -32767.0), 32767.0).to(tl.int32)


@triton.jit
def reciprocal_rms(sum_squares, count: tl.constexpr, step, eps):
    """fl(1 / sqrt(mean * step**2 + eps)) of `rms_integer`."""
    mean = tl.div_rn(sum_squares.to(tl.float32), tl.full(step.shape, count, tl.float32))
    return over(1.0, tl.sqrt_rn(mean * (step * step) + eps))


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG_BLOCK: tl.constexpr):
    """`reference.hadamard` of blocks of 2**LOG_BLOCK along the second axis of x (ROWS, WIDTH)."""
    for b in tl.static_range(LOG_BLOCK):
        pairs = tl.permute(tl.reshape(x, (ROWS, WIDTH >> (b + 1), 2, 1 << b)), (0, 1, 3, 2))
        low, high = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2)), (ROWS, WIDTH))
    return x


@triton.jit
def sigmoid_exp2(z):
    """`reference.exp2` for |z| <= 48: Horner's rule, coefficients of spec/constants.py."""
    n = rint(z)
    f = z - n
    p = tl.full(f.shape, C6, tl.float32)
    p = p * f + C5
    p = p * f + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    p = p * f + C0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def table_entry(f):
    """LUT15[f] by the device's own exp2; held to the table by exponential.self_test before use."""
    x = ((f | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC) * -0.015625
    return (tl.exp2(x) * 32672.25 + MAGIC).to(tl.int32, bitcast=True) & 0xFFFF


@triton.jit
def attention_weight(t, m, q_scale, lut_ptr, TABLE: tl.constexpr):
    """P of `reference.weights_below`. Where t > m (keys that are not visible) the value means nothing and is dropped."""
    y = tl.minimum((m - t) * q_scale, XI_MAX)
    xi = (y + MAGIC).to(tl.int32, bitcast=True)
    entry = tl.load(lut_ptr + (xi & 63)) if TABLE else table_entry(xi & 63)
    return ((entry >> ((xi >> 6) & 15)) + 1) >> 1


@triton.jit
def ordered(x):
    """A float as an unsigned integer of the same order, above 0: atomic maxima start from cleared memory."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def unordered(key):
    """Inverse of `ordered`."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)
