"""GVFAVeriMM and LPVeriExp: the residuals of a claim, and the bounds of lemmas 1 and 2."""

from __future__ import annotations

import itertools
import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from veriattn.convert.checkpoint import F32, F64
from veriattn.floatmode.params import CheckParams

I64 = npt.NDArray[np.int64]

_MAX_BUCKET = 96  # mantissas below 2 multiply to less than 2**96 in float32
_TINY = np.float32(np.finfo(np.float32).tiny)


def generator(seed: int | None = None) -> np.random.Generator:
    """Randomness for challenges: 256 bits from the system as the seed; a seed of one's own is for experiments."""
    return np.random.Generator(np.random.PCG64(secrets.randbits(256) if seed is None else seed))


def gaussian(rng: np.random.Generator, n: int, count: int) -> F32:
    """Challenge vectors w ~ N(0, I), (n, count)."""
    return rng.standard_normal((n, count), np.float32)


def coefficients(rng: np.random.Generator, n: int, params: CheckParams) -> I64:
    """Secret a in 1..n_a, (tau_a, n)."""
    return rng.integers(1, params.n_a + 1, (params.tau_a, n))


def max_residual(claimed: F32, expected: F32) -> float:
    """Largest |claimed - expected|; infinite where anything is not finite (a NaN compares as small)."""
    if claimed.size == 0:
        return 0.0
    worst = float(np.max(np.abs(claimed - expected)))
    return worst if math.isfinite(worst) else math.inf


def gvfa_residual(claimed: F32, w: F32, expected: F32) -> float:
    """GVFAVeriMM: max-norm of claimed @ w - expected, where expected = A (B w) is the trusted side's own.

    Shapes: claimed (rows, n), w (n, repetitions), expected (rows, repetitions).
    """
    with np.errstate(all="ignore"):
        return max_residual(claimed @ w, expected)


@dataclass(frozen=True)
class Buckets:
    """Positions ordered by coefficient, cut where the coefficient changes and after every _MAX_BUCKET of them."""

    a: I64
    order: I64
    starts: I64
    values: I64

    @classmethod
    def of(cls, a: I64) -> Buckets:
        """For one coefficient vector (n,)."""
        order = np.argsort(a, kind="stable")
        ranked = a[order]
        change = np.flatnonzero(np.diff(ranked)) + 1
        edges = np.concatenate([[0], change, [a.size]])
        starts = np.concatenate([np.arange(lo, hi, _MAX_BUCKET) for lo, hi in itertools.pairwise(edges)])
        return cls(a, order, starts, ranked[starts])


def log_product(y: F32, buckets: Buckets) -> F64:
    """log prod_i y_i^(a_i) of every column, with a single logarithm each; NaN where a value is not positive and normal.

    The product is held as m * 2**e. Powers of two add up as integers; mantissas of equal coefficients are multiplied
    first, and the powers come from running products over falling coefficients: prod_v P_v^v = prod_v prod_{w >= v} P_w.
    Shapes: y (n, columns) -> (columns,). Bounds: n * n_a < 2**53 / 256.
    """
    n, columns = y.shape
    if n == 0:
        return np.zeros(columns)
    bits = np.ascontiguousarray(y).view(np.int32)
    # Positive normal numbers are exactly the bit patterns from `tiny` to below infinity.
    good = (bits.min(axis=0) >= 0x0080_0000) & (bits.max(axis=0) < 0x7F80_0000)
    exponents = (bits >> 23).astype(np.float32)
    power = np.zeros(columns)
    block = max(1, (1 << 24) // (256 * int(buckets.a.max())))  # exact in float32
    a_f32 = buckets.a.astype(np.float32)
    for lo in range(0, n, block):
        power += (a_f32[lo : lo + block] @ exponents[lo : lo + block]).astype(np.float64)
    power -= 127.0 * float(buckets.a.sum())
    mantissa = ((bits & 0x007F_FFFF) | 0x3F80_0000)[buckets.order].view(np.float32)
    products = np.multiply.reduceat(mantissa, buckets.starts, axis=0).astype(np.float64)
    running, result = np.ones(columns), np.ones(columns)
    bucket = buckets.starts.size - 1
    running_exp, result_exp = np.zeros(columns), np.zeros(columns)
    for v in range(int(buckets.values[-1]), 0, -1):
        while bucket >= 0 and buckets.values[bucket] == v:
            running, e = np.frexp(running * products[bucket])
            running_exp += e
            bucket -= 1
        result, e = np.frexp(result * running)
        result_exp += running_exp + e
    out = np.log(result) + (result_exp + power) * math.log(2.0)
    return np.where(good, out, np.nan)


def lp_residuals(y: F32, buckets: Buckets, expected: F32 | F64) -> F64:
    """LPVeriExp before the Gaussian factor: R = log prod_i y_i^(a_i) - sum_i a_i s_i per column, infinite for bad values.

    Shapes: y (n, columns), expected (columns,) = q.(sum_i a_i k_i)/sqrt(d) less the row's shift times sum_i a_i.
    """
    with np.errstate(all="ignore"):
        r = log_product(y, buckets) - expected
    return np.where(np.isfinite(r), r, np.inf)


def lp_worst(r: F64, rng: np.random.Generator, tau_g: int) -> float:
    """Largest |R w'| over rows and tau_g draws of w' ~ N(0, 1)."""
    if r.size == 0:
        return 0.0
    if not np.isfinite(r).all():
        return math.inf
    return float(np.max(np.abs(r)[:, None] * np.abs(rng.standard_normal((r.size, tau_g)))))


def _within(ratio: float) -> float:
    """2 Phi(ratio) - 1."""
    return math.erf(ratio / math.sqrt(2.0))


def lemma1_bound(eps: float, sigma: float, tau: int) -> float:
    """False-accept bound of GVFAVeriMM: (2 Phi(eps/sigma) - 1)^tau, sigma the largest row norm of the error."""
    return _within(eps / sigma) ** tau if sigma > 0 else 1.0


def lemma2_bound(eps: float, sigma: float, errors: int, params: CheckParams) -> float:
    """False-accept bound of LPVeriExp for a row: (1{errors >= 2}/n_a + (2 Phi(eps/sigma) - 1)^tau_g)^tau_a.

    sigma: |R| of the row, given that it is not zero.
    """
    inner = (1.0 / params.n_a if errors >= 2 else 0.0) + lemma1_bound(eps, sigma, params.tau_g)
    return min(1.0, inner) ** params.tau_a
