"""The clipping search against exact arithmetic, and its edges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import Bits

from veriattn.convert.quantise import CLIP_FRACTIONS, quantise_rows
from veriattn.convert.rotation import F64
from veriattn.errors import ModelError
from veriattn.spec.constants import MAX_IN_FEATURES, SCALE_MAX, SCALE_MIN


def oracle(row: list[float]) -> tuple[list[int], float]:
    """The same search in Python numbers: one operation at a time, sums in exact integers."""
    peak = max(*map(abs, row), float(SCALE_MIN) * 127)
    best: tuple[float, float] | None = None
    for fraction in CLIP_FRACTIONS:
        scale = max(float(np.float32(peak * fraction / 127.0)), float(SCALE_MIN))
        units = 0
        for v in row:
            z = v * (1.0 / scale)
            z -= max(-127.0, min(127.0, float(round(z))))
            units += round(z * z * 65536.0)
        error = float(units) * (scale * scale)
        if best is None or error < best[0]:
            best = (error, scale)
    assert best is not None
    return [max(-127, min(127, round(v * (1.0 / best[1])))) for v in row], best[1]


rows = st.lists(
    st.floats(-8, 8, allow_nan=False, allow_subnormal=False, width=64).map(lambda v: v if abs(v) > 1e-30 else 0.0),
    min_size=1,
    max_size=24,
)


@settings(max_examples=150, deadline=None)
@given(rows)
def test_rows_match_the_oracle(row: list[float]) -> None:
    q, scale = quantise_rows(np.array([row]))
    want_q, want_scale = oracle(row)
    assert q.tolist() == [want_q]
    assert float(scale[0]) == want_scale


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 64), (4, 1000)])
def test_pieces_do_not_know_each_other(shape: tuple[int, int]) -> None:
    w = Bits("quantise").uniform(-1, 1, *shape).astype(np.float64) ** 3
    kept = w.copy()
    q, scale = quantise_rows(w)
    assert np.array_equal(w, kept)
    assert q.dtype == np.int8 and scale.dtype == np.float32
    for i in range(shape[0]):
        one, one_scale = quantise_rows(w[i : i + 1])
        assert np.array_equal(one[0], q[i]) and one_scale[0] == scale[i]
    wide = np.zeros((shape[0], 2 * shape[1]))
    wide[:, ::2] = w
    again, again_scale = quantise_rows(wide[:, ::2])  # strided input, same bits
    assert np.array_equal(again, q) and np.array_equal(again_scale, scale)


def test_an_outlier_is_clipped_and_a_flat_row_is_not() -> None:
    row = Bits("outlier").uniform(-1, 1, 4000).astype(np.float64)
    row[7] = 1.3
    q, scale = quantise_rows(row[None])
    assert float(scale[0]) < 1.3 / 127 * 0.99
    assert q[0, 7] == 127
    _, flat = quantise_rows(np.array([[127.0, -64.0, 3.0, 0.0]]))
    assert float(flat[0]) == 1.0


def test_ties_go_to_the_first_fraction() -> None:
    """A row of zeros has error 0 with every scale, which is the smallest allowed one."""
    q, scale = quantise_rows(np.zeros((2, 3)))
    assert not q.any()
    assert scale.tolist() == [float(SCALE_MIN)] * 2


def test_sums_stay_exact_for_the_longest_row() -> None:
    """The bound behind the float sum: the largest error of an element, 131071 times, is below 2**53."""
    lowest = CLIP_FRACTIONS[-1]
    worst = (127 / Fraction(np.float32(lowest * (1 - 2.0**-20)).item()) - 127) ** 2 * 65536
    assert worst < 2**28
    assert (worst + 1) * MAX_IN_FEATURES < 2**53
    # A row that comes near it: many values at the peak. Two orders, one answer.
    w = np.full((1, MAX_IN_FEATURES), 1.0)
    w[0, ::3] = -0.317
    _, scale = quantise_rows(w)
    _, other = quantise_rows(np.ascontiguousarray(w[:, ::-1]))
    assert scale[0] == other[0]


@pytest.mark.parametrize(
    "value",
    [np.inf, -np.inf, np.nan, 1e300, float(SCALE_MAX) * 127 * 1.0001],
    ids=["inf", "-inf", "nan", "1e300", "over"],
)
def test_a_row_that_int8_cannot_hold_is_refused(value: float) -> None:
    w: F64 = np.full((3, 4), 0.5)
    w[1, 2] = value
    with pytest.raises(ModelError, match="not finite or too large"):
        quantise_rows(w)


def test_the_largest_row_that_fits_is_kept() -> None:
    q, scale = quantise_rows(np.array([[float(SCALE_MAX) * 127, 0.0]]))
    assert q.tolist() == [[127, 0]]
    assert scale[0] == SCALE_MAX


def test_too_many_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match="131072 inputs"):
        quantise_rows(np.zeros((1, MAX_IN_FEATURES + 1)))
