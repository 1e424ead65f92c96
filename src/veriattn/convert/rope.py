"""Rotary tables that come out the same on every machine: decimal arithmetic first, one binary32 rounding last."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, InvalidOperation, Overflow, localcontext

import numpy as np
import numpy.typing as npt

from veriattn.convert.checkpoint import FrequencyFactors, Llama3Scaling, RopeScaling

_DIGITS = 40
# Complete, so that no setting of the calling thread has a part in the result.
_CONTEXT = Context(
    prec=_DIGITS,
    rounding=ROUND_HALF_EVEN,
    Emin=-999999,
    Emax=999999,
    clamp=0,
    flags=[],
    traps=[InvalidOperation, DivisionByZero, Overflow],
)
_SPLIT = 256


def _pi() -> Decimal:
    """Machin's formula."""

    def arctan_inverse(n: int) -> Decimal:
        term = Decimal(1) / n
        total, k, square = term, 1, n * n
        while abs(term) > Decimal(10) ** -(_DIGITS + 3):
            term = -term / square
            k += 2
            total += term / k
        return total

    return 4 * (4 * arctan_inverse(5) - arctan_inverse(239))


def _cos_sin(angle: Decimal, two_pi: Decimal) -> tuple[Decimal, Decimal]:
    """Cosine and sine by Taylor series after reduction to [-pi, pi]."""
    x = angle - two_pi * (angle / two_pi).to_integral_value()
    square, limit = x * x, Decimal(10) ** -(_DIGITS - 4)
    cos, term, k = Decimal(1), Decimal(1), 0
    while abs(term) > limit:
        k += 2
        term = -term * square / (k * (k - 1))
        cos += term
    sin, term, k = x, x, 1
    while abs(term) > limit:
        k += 2
        term = -term * square / (k * (k - 1))
        sin += term
    return cos, sin


def inverse_frequencies(theta: float, rotary_dim: int, scaling: RopeScaling | None) -> list[Decimal]:
    """theta**(-2i/r), with Llama 3 scaling or explicit divisors. Exact inputs, 40 digits."""
    with localcontext(_CONTEXT):
        two_pi = 2 * _pi()
        log_theta = Decimal(theta).ln()
        out = []
        for i in range(rotary_dim // 2):
            f = (-log_theta * 2 * i / rotary_dim).exp()
            if isinstance(scaling, FrequencyFactors):
                f = f / Decimal(scaling.factors[i])
            elif isinstance(scaling, Llama3Scaling):
                original = Decimal(scaling.original_max_positions)
                low, high, factor = (
                    Decimal(v) for v in (scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor)
                )
                wavelength = two_pi / f
                if wavelength > original / low:
                    f = f / factor
                elif wavelength >= original / high:
                    smooth = (original / wavelength - low) / (high - low)
                    f = (1 - smooth) * f / factor + smooth * f
            out.append(f)
        return out


def rotary_tables(
    frequencies: list[Decimal], positions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """cos and sin tables (positions, len(frequencies)) in binary32.

    Angles split as 256 a + b: both tables in decimal, combined by the addition theorem in binary64 (error below 2^-50),
    then rounded. Entries below 2^-30 become 0 (docs/spec.md section 2).
    """
    high_count = (positions + _SPLIT - 1) // _SPLIT
    cos = np.empty((high_count * _SPLIT, len(frequencies)), np.float32)
    sin = np.empty_like(cos)
    with localcontext(_CONTEXT):
        two_pi = 2 * _pi()
        for i, f in enumerate(frequencies):
            low = np.array([[float(v) for v in _cos_sin(f * b, two_pi)] for b in range(_SPLIT)])
            high = np.array([[float(v) for v in _cos_sin(f * _SPLIT * a, two_pi)] for a in range(high_count)])
            hc, hs, lc, ls = high[:, :1], high[:, 1:], low[None, :, 0], low[None, :, 1]
            cos[:, i] = (hc * lc - hs * ls).astype(np.float32).reshape(-1)
            sin[:, i] = (hs * lc + hc * ls).astype(np.float32).reshape(-1)
    for table in (cos, sin):
        table[np.abs(table) < np.float32(2.0**-30)] = 0
    return cos[:positions].copy(), sin[:positions].copy()
