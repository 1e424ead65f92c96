"""The fixed rotations: what they are, that they are orthogonal, and that their bits hang on nothing but the input."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from tests.helpers import Bits

from veriattn.convert.rotation import F64, hadamard_normalised, prime_factors, rotate_residual, rotation_signs

WIDTHS = [1, 2, 3, 5, 8, 12, 35, 48, 64, 90, 144, 576]


def walsh(size: int) -> np.ndarray:
    """Entry (i, j) is (-1)**popcount(i & j)."""
    i = np.arange(size)
    return 1 - 2 * np.array([[bin(a & b).count("1") & 1 for b in i] for a in i])


def rational_rotation(width: int) -> tuple[list[list[Fraction]], int]:
    """The rotation times sqrt(block) in exact fractions, built as a Kronecker product; and the block."""
    block = width & -width
    rows = [[Fraction(1)]]
    for p in [*prime_factors(width // block), None]:
        if p is None:
            small = [[Fraction(int(v)) for v in row] for row in walsh(block)]
        else:
            small = [[Fraction(int(i == j)) - Fraction(2, p) for j in range(p)] for i in range(p)]
        rows = [[a * b for a in left for b in right] for left in rows for right in small]
    signs = rotation_signs(width)
    return [[v * int(s) for v, s in zip(row, signs, strict=True)] for row in rows], block


def rotation_matrix(width: int) -> F64:
    return rotate_residual(np.eye(width), rotation_signs(width))


def test_prime_factors() -> None:
    assert [prime_factors(n) for n in (1, 2, 9, 35, 97, 360)] == [[], [2], [3, 3], [5, 7], [97], [2, 2, 2, 3, 3, 5]]


def test_signs_are_the_bits_of_sha256() -> None:
    first = hashlib.sha256(b"veriattn/rotation/1" + bytes(4)).digest()
    second = hashlib.sha256(b"veriattn/rotation/1\x01\x00\x00\x00").digest()
    bits = "".join(f"{byte:08b}"[::-1] for byte in first + second)
    assert rotation_signs(300).tolist() == [1.0 - 2.0 * int(b) for b in bits[:300]]
    assert np.array_equal(rotation_signs(300)[:40], rotation_signs(40))


@pytest.mark.parametrize("width", [w for w in WIDTHS if w <= 144])
def test_rotation_is_the_kronecker_product(width: int) -> None:
    """Within a few roundings of binary64: 2/p and 1/sqrt(block) are rounded numbers."""
    exact, block = rational_rotation(width)
    want = np.array([[float(v) for v in row] for row in exact]) / np.sqrt(block)
    assert np.max(np.abs(rotation_matrix(width) - want)) < 2.0**-50


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_is_orthogonal(width: int) -> None:
    r = rotation_matrix(width)
    assert np.max(np.abs(r @ r.T - np.eye(width))) < 2.0**-46
    assert np.max(np.abs(r.T @ r - np.eye(width))) < 2.0**-46


def test_rotation_spreads_an_outlier() -> None:
    """What it is for: one large channel becomes many small ones (with 576 = 64 * 3 * 3, at most 4/9 / 8 of it)."""
    assert np.max(np.abs(rotation_matrix(576))) <= 4 / 9 / 8 + 2.0**-50
    assert np.max(np.abs(rotation_matrix(64))) == 1 / 8


@pytest.mark.parametrize("block", [1, 2, 4, 16, 64])
def test_hadamard_with_whole_numbers_is_exact(block: int) -> None:
    """With sqrt(block) a power of two nothing rounds; else one multiplication does, by the same number for all."""
    x = Bits("hadamard").integers(-1000, 1000, 3 * block, 5).astype(np.float64)
    want = np.concatenate([walsh(block) @ x[i : i + block] for i in range(0, 3 * block, block)])
    assert np.array_equal(hadamard_normalised(x, block), want * (1.0 / np.sqrt(block)))


@pytest.mark.parametrize("block", [1, 4, 64])
def test_hadamard_is_its_own_inverse(block: int) -> None:
    x = Bits("inverse").integers(-1000, 1000, 2 * block, 7).astype(np.float64)
    kept = x.copy()
    assert np.array_equal(hadamard_normalised(hadamard_normalised(x, block), block), x)
    assert np.array_equal(x, kept)


@pytest.mark.parametrize("width", [35, 48, 576])
def test_columns_do_not_know_each_other(width: int) -> None:
    """Any cut into pieces gives the same bits: threads and piece sizes have no part in a digest."""
    signs = rotation_signs(width)
    x = Bits("columns").uniform(-3, 3, width, 13).astype(np.float64)
    kept = x.copy()
    whole = rotate_residual(x, signs)
    assert np.array_equal(x, kept)
    for columns in ([0], [12], [3, 4, 5], list(range(12, -1, -1))):
        assert np.array_equal(rotate_residual(np.ascontiguousarray(x[:, columns]), signs), whole[:, columns])


@pytest.mark.parametrize(
    ("width", "digest"),
    [
        (64, "e717f55155cb893b841b41cad8c823fa995d3f3c49be2fc287e98ebcebabbc20"),
        (90, "ccf6a7cb4d97937e003a8c3d1a691e6f54494069caa6f0e813e9b0eb972201cb"),
        (576, "4570a39b2ea4fc5716121defbc3522adafba08cb43c5c7861ac9052522ed3042"),
    ],
)
def test_bits_are_pinned(width: int, digest: str) -> None:
    x = Bits(f"pinned/{width}").uniform(-3, 3, width, 4).astype(np.float64)
    assert hashlib.sha256(rotate_residual(x, rotation_signs(width)).astype("<f8").tobytes()).hexdigest() == digest
