"""GVFAVeriMM, LPVeriExp and the formats: residuals of honest and of wrong claims."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veriattn.errors import InternalError, UsageError
from veriattn.floatmode.checks import (
    coefficients,
    gaussian,
    generator,
    gvfa_residual,
    lemma1_bound,
    lemma2_bound,
    lp_residuals,
    lp_worst,
)
from veriattn.floatmode.formats import decode, encode, rounded
from veriattn.floatmode.params import CheckParams
from veriattn.floatmode.trusted import project, weighted_sum
from veriattn.native.floats import log_product


def seeing_all(y: np.ndarray) -> np.ndarray:
    return np.full(y.shape[1], y.shape[0], np.int32)


@pytest.mark.parametrize(
    ("n", "columns", "n_a"),
    [(1, 1, 1), (1, 3, 16), (7, 2, 300), (1000, 5, 16), (3000, 2, 1), (130, 700, 9), (90, 65, 2)],
)
def test_log_product_is_the_weighted_sum_of_logarithms(n: int, columns: int, n_a: int) -> None:
    rng = generator(1)
    y = np.exp(-60 * rng.random((n, columns), np.float32))
    a = coefficients(rng, n, CheckParams(n_a=n_a))[0]
    expected = a @ np.log(y.astype(np.float64))
    # Mantissas are multiplied in float32: at most one rounding per factor, weighted by its coefficient.
    assert np.all(np.abs(log_product(y, a, seeing_all(y)) - expected) <= (n + 2) * n_a * 2.0**-23)


def test_log_product_of_powers_of_two_is_exact_to_the_last_logarithm() -> None:
    y = np.float32(2.0) ** -np.arange(1, 101, dtype=np.float32)[:, None]
    a = np.full(100, 3, np.int32)
    assert log_product(y, a, seeing_all(y))[0] == pytest.approx(-3 * 5050 * math.log(2), rel=1e-15)


@pytest.mark.parametrize(("n", "columns"), [(40, 30), (129, 70), (5, 5)])
def test_a_column_is_the_product_of_the_keys_that_it_sees(n: int, columns: int) -> None:
    rng = generator(4)
    y = np.float32(2.0) ** rng.integers(-100, 100, (n, columns)).astype(np.float32)
    a = coefficients(rng, n, CheckParams())[0]
    visible = rng.integers(0, n + 1, columns, np.int32)
    for column, seen in enumerate(visible):
        y[seen:, column] = np.nan
    exponents = np.where(np.arange(n)[:, None] < visible, np.log2(y), 0.0)
    assert np.array_equal(log_product(y, a, visible), (a @ exponents) * math.log(2.0))


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e-40])
@pytest.mark.parametrize("n", [9, 3, 70])
def test_values_that_no_exponential_gives_are_rejected(bad: float, n: int) -> None:
    y = np.full((n, 3), 0.5, np.float32)
    a = np.arange(n, dtype=np.int32) % 4 + 1
    expected = np.full(3, float(a.sum()) * math.log(0.5))
    assert np.isfinite(lp_residuals(y, a, seeing_all(y), expected)).all()
    y[n - 2, 1] = bad
    residuals = lp_residuals(y, a, seeing_all(y), expected)
    assert np.isinf(residuals[1])
    assert np.isfinite(residuals[[0, 2]]).all()
    assert lp_worst(residuals, generator(0), 1) == math.inf


@pytest.mark.parametrize("a", [[0], [4097], [1, 2], [-1]])
def test_coefficients_out_of_range_are_refused(a: list[int]) -> None:
    with pytest.raises(InternalError):
        log_product(np.ones((1, 2), np.float32), np.array(a, np.int32), np.ones(2, np.int32))


def test_one_wrong_product_leaves_a_residual() -> None:
    rng = generator(2)
    a, b = rng.standard_normal((5, 20), np.float32), rng.standard_normal((20, 8), np.float32)
    w = gaussian(rng, 8, 2)
    c = a @ b
    assert gvfa_residual(c, w, a @ (b @ w)) < 1e-4
    c[3, 2] += 1.0
    assert gvfa_residual(c, w, a @ (b @ w)) > 1e-2
    c[3, 2] = np.nan
    assert gvfa_residual(c, w, a @ (b @ w)) == math.inf


def test_bounds_of_the_lemmas() -> None:
    assert lemma1_bound(1.0, 1.0, 1) == pytest.approx(0.6826894921)
    assert lemma1_bound(1.0, 1.0, 3) == pytest.approx(0.6826894921**3)
    assert lemma1_bound(1.0, 0.0, 3) == 1.0
    params = CheckParams(n_a=16, tau_a=2, tau_g=1)
    assert lemma2_bound(0.0, 1.0, 2, params) == pytest.approx(1 / 256)
    assert lemma2_bound(0.0, 1.0, 1, params) == 0.0


def test_measured_false_accepts_stay_under_the_first_lemma() -> None:
    rng = generator(3)
    error = np.zeros(64, np.float32)
    error[:4] = 0.5  # norm 1
    w = rng.standard_normal((20_000, 64, 2), np.float32)
    accepted = float(np.mean(np.abs(error @ w.transpose(1, 0, 2).reshape(64, -1)).reshape(-1, 2).max(axis=1) <= 0.5))
    bound = lemma1_bound(0.5, 1.0, 2)
    assert abs(accepted - bound) < 4 * math.sqrt(bound / 20_000)


def test_formats_round_to_nearest_even() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1e-45, np.inf, 65520.0], np.float32)
    assert rounded(x, "bfloat16").tolist() == [1.0, 1 + 2.0**-6, -0.0, np.inf, 65536.0]
    assert rounded(x, "float16").tolist() == [float(x[0]), float(x[1]), -0.0, np.inf, np.inf]
    assert rounded(x, "float32").tolist() == x.tolist()
    assert np.isnan(decode(encode(np.array([-np.nan], np.float32), "bfloat16"), "bfloat16")).all()


@pytest.mark.parametrize("change", [{"n_a": 0}, {"tau_g": 0}, {"factor": 0.5}, {"challenges": "never"}])
def test_parameters_have_ranges(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        CheckParams(**change)  # type: ignore[arg-type]


def test_challenges_come_from_the_system() -> None:
    assert not np.array_equal(generator().integers(0, 1 << 30, 8), generator().integers(0, 1 << 30, 8))


@pytest.mark.parametrize("n", [0, 1, 255, 256, 700])
def test_sums_and_projections_are_those_of_plain_products(n: int) -> None:
    rng = generator(6)
    k = rng.integers(-8, 9, (n, 5)).astype(np.float32)
    a = rng.integers(1, 17, (2, n), np.int32)
    w = rng.integers(-8, 9, (5, 3)).astype(np.float32)
    assert np.array_equal(weighted_sum(a, k), a.astype(np.float64) @ k.astype(np.float64))
    assert np.array_equal(project(k, w), k @ w)
