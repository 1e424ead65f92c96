"""GVFAVeriMM and LPVeriExp: the residuals of a claim, and the bounds of lemmas 1 and 2."""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt

from veriattn.convert.checkpoint import F32, F64
from veriattn.floatmode.params import CheckParams
from veriattn.native.floats import log_product

I32 = npt.NDArray[np.int32]


def generator(seed: int | None = None) -> np.random.Generator:
    """Randomness for challenges: 256 bits from the system as the seed; a seed of one's own is for experiments."""
    return np.random.Generator(np.random.PCG64(secrets.randbits(256) if seed is None else seed))


def gaussian(rng: np.random.Generator, n: int, count: int) -> F32:
    """Challenge vectors w ~ N(0, I), (n, count)."""
    return rng.standard_normal((n, count), np.float32)


def coefficients(rng: np.random.Generator, n: int, params: CheckParams) -> I32:
    """Secret a in 1..n_a, (tau_a, n)."""
    return rng.integers(1, params.n_a + 1, (params.tau_a, n), np.int32)


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


def lp_residuals(y: F32, a: I32, visible: I32, expected: F64) -> F64:
    """LPVeriExp before the Gaussian factor: R = log prod_i y_i^(a_i) - sum_i a_i s_i per column, infinite for bad values.

    Trust: y is adversarial, in private memory. One logarithm per column (`native.floats.log_product`).
    Shapes: y (n, columns), a (n,), visible (columns,): how many keys a column sees; expected (columns,) =
    q.(sum_i a_i k_i)/sqrt(d) less the row's shift times sum_i a_i, over those keys.
    """
    with np.errstate(all="ignore"):
        r = log_product(y, a, visible) - expected
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
