"""Rotary tables against high-precision oracles that share no formula with them."""

from __future__ import annotations

import _pydecimal
import decimal
from decimal import ROUND_DOWN, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from veriattn.convert import rope
from veriattn.convert.checkpoint import FrequencyFactors, Llama3Scaling, RopeScaling, SourceConfig
from veriattn.convert.rope import inverse_frequencies, rotary_tables

#: pi to 60 digits, from the literature.
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494")


def exact_cos_sin(angle: Fraction, bits: int = 160) -> tuple[Fraction, Fraction]:
    """Taylor series of a tiny angle in integers of 2**-bits, then repeated doubling: no reduction modulo 2 pi."""
    halvings = max(0, int(angle).bit_length()) + 8
    guard = bits + 4 * halvings
    one = 1 << guard
    x = int(angle * one) >> halvings
    cos, sin, term, k = one, 0, one, 0
    while term:
        k += 1
        term = term * x // (k * one)
        if k % 2:
            sin += term if k % 4 == 1 else -term
        else:
            cos += term if k % 4 == 0 else -term
    for _ in range(halvings):
        cos, sin = (cos * cos - sin * sin) // one, 2 * cos * sin // one
    return Fraction(cos, one), Fraction(sin, one)


def ulp32(x: Fraction) -> Fraction:
    return Fraction(float(np.spacing(np.float32(abs(float(x))))))


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0, 1.25])
@pytest.mark.parametrize("rotary_dim", [2, 24, 64, 128])
def test_plain_frequencies_satisfy_their_equation(theta: float, rotary_dim: int) -> None:
    """f_i = theta**(-2i/r), so f_i**r * theta**(2i) = 1: checked by integer powers alone."""
    with localcontext() as ctx:
        ctx.prec = 60
        for i, f in enumerate(inverse_frequencies(theta, rotary_dim, None)):
            assert abs(f**rotary_dim * Decimal(theta) ** (2 * i) - 1) < Decimal(10) ** -35


def test_scaled_frequencies() -> None:
    plain = [Fraction(f) for f in inverse_frequencies(500000.0, 64, None)]
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    kinds = set()
    for f, got in zip(plain, inverse_frequencies(500000.0, 64, scaling), strict=True):
        turns = 8192 * f / (2 * PI)  # turns within the original context
        if turns > 4:
            want, kind = f, "kept"
        elif turns < 1:
            want, kind = f / 8, "stretched"
        else:
            share = (turns - 1) / 3
            want, kind = (1 - share) * f / 8 + share * f, "blended"
        kinds.add(kind)
        assert abs(Fraction(got) / want - 1) < Fraction(1, 10**36)
    assert kinds == {"kept", "stretched", "blended"}
    factors = FrequencyFactors(tuple(1.0 + i / 8 for i in range(32)))
    for f, got, factor in zip(plain, inverse_frequencies(500000.0, 64, factors), factors.factors, strict=True):
        assert abs(Fraction(got) * Fraction(factor) / f - 1) < Fraction(1, 10**36)


@pytest.mark.parametrize(
    "scaling",
    [None, Llama3Scaling(32.0, 1.0, 4.0, 8192), FrequencyFactors((4.0,) * 32)],
)
def test_frequencies_agree_with_the_float_reference(scaling: RopeScaling | None) -> None:
    """The float model computes them in binary64 from the same definition: a few units in its last place apart."""
    config = SourceConfig("llama", 64, 1, 1, 1, 64, 64, 8, 8, 1e-5, 500000.0, 64, rope_scaling=scaling)
    got = np.array([float(f) for f in inverse_frequencies(500000.0, 64, scaling)])
    assert np.max(np.abs(got / config.inv_freq() - 1)) < 2.0**-48


@pytest.mark.parametrize(("theta", "positions"), [(10000.0, 2048), (500000.0, 131072)])
def test_tables_are_the_true_values_rounded(theta: float, positions: int) -> None:
    """Half a unit in the last place of binary32, plus 2**-50 for the addition theorem in binary64."""
    frequencies = inverse_frequencies(theta, 8, None)
    cos, sin = rotary_tables(frequencies, positions)
    assert cos.shape == sin.shape == (positions, 4)
    picked = [0, 1, 255, 256, 257, positions // 3, positions - 256, positions - 1]
    for i, f in enumerate(frequencies):
        for t in picked:
            for got, want in zip((cos[t, i], sin[t, i]), exact_cos_sin(Fraction(f) * t), strict=True):
                if abs(want) < Fraction(1, 2**31):
                    assert got == 0
                else:
                    assert abs(Fraction(float(got)) - want) <= ulp32(want) / 2 + Fraction(1, 2**50)


def test_values_below_the_floor_are_zero() -> None:
    """A frequency of pi/256 makes sin(256) as small as binary64 lets it come out; the table must hold 0."""
    with localcontext() as ctx:
        ctx.prec = 40
        frequency = (Decimal(PI.numerator) / Decimal(PI.denominator)) / 256
    _, sin = rotary_tables([frequency], 513)
    assert sin[0, 0] == sin[256, 0] == sin[512, 0] == 0
    assert np.all(np.abs(sin[sin != 0]) >= 2.0**-30)


@pytest.mark.parametrize("positions", [1, 255, 256, 257, 600])
def test_a_shorter_table_is_the_head_of_a_longer_one(positions: int) -> None:
    frequencies = inverse_frequencies(10000.0, 4, None)
    long, short = rotary_tables(frequencies, 700), rotary_tables(frequencies, positions)
    for a, b in zip(long, short, strict=True):
        assert b.shape == (positions, 2)
        assert np.array_equal(a[:positions], b)


def test_the_callers_decimal_context_has_no_part_in_it() -> None:
    plain = inverse_frequencies(10000.0, 8, Llama3Scaling(8.0, 1.0, 4.0, 64))
    tables = rotary_tables(plain, 300)
    with localcontext() as ctx:
        ctx.prec, ctx.rounding, ctx.Emax, ctx.Emin = 5, ROUND_DOWN, 3, -3
        ctx.traps[decimal.Inexact] = True
        assert inverse_frequencies(10000.0, 8, Llama3Scaling(8.0, 1.0, 4.0, 64)) == plain
        for a, b in zip(tables, rotary_tables(plain, 300), strict=True):
            assert np.array_equal(a, b)


def test_pythons_own_decimal_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`decimal` is C (libmpdec) on CPython and Python elsewhere; ln and exp are correctly rounded in both."""
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    want = inverse_frequencies(500000.0, 6, scaling)
    tables = rotary_tables(want, 300)
    slow = _pydecimal.Context(
        prec=40,
        rounding="ROUND_HALF_EVEN",
        Emin=-999999,
        Emax=999999,
        clamp=0,
        flags=[],
        traps=[],
    )
    monkeypatch.setattr(rope, "_CONTEXT", slow)
    monkeypatch.setattr(rope, "Decimal", _pydecimal.Decimal)
    monkeypatch.setattr(rope, "localcontext", _pydecimal.localcontext)
    got = inverse_frequencies(500000.0, 6, scaling)
    assert type(got[0]) is _pydecimal.Decimal
    assert [str(f) for f in got] == [str(f) for f in want]
    for a, b in zip(tables, rotary_tables(got, 300), strict=True):
        assert np.array_equal(a, b)
