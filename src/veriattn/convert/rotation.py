"""Orthogonal transforms folded into weights, in binary64 with a fixed order of operations.

Only `+ - * /` and `sqrt` on whole arrays are used, no BLAS and no sums over floats: two machines get the same bits.
Everything acts on the first axis, where each step is one operation on contiguous rows; callers transpose small pieces.
Source of the method: QuaRot (Ashkboos et al. 2024); a width that is no power of two is completed by small reflections.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from veriattn.spec.constants import largest_power_of_two_divisor

F64 = npt.NDArray[np.float64]


def prime_factors(n: int) -> list[int]:
    """Prime factors of n with multiplicity, ascending."""
    out, p = [], 2
    while p * p <= n:
        while n % p == 0:
            out.append(p)
            n //= p
        p += 1
    return out + ([n] if n > 1 else [])


def rotation_signs(size: int) -> F64:
    """Fixed signs of the residual rotation: bits of SHA-256("veriattn/rotation/1" || counter), lowest bit first."""
    bits: list[int] = []
    counter = 0
    while len(bits) < size:
        digest = hashlib.sha256(b"veriattn/rotation/1" + counter.to_bytes(4, "little")).digest()
        bits.extend((byte >> i) & 1 for byte in digest for i in range(8))
        counter += 1
    return 1.0 - 2.0 * np.array(bits[:size], dtype=np.float64)


def hadamard_normalised(x: F64, block: int) -> F64:
    """Orthonormal Walsh-Hadamard transform of each `block` of the first axis; the result is a new array.

    Shapes: (size, n) -> (size, n), `block` a power of two that divides size. Butterflies of stride 1, 2, 4, ...
    """
    y, spare = x, np.empty(x.shape)
    other = np.empty(x.shape) if block > 2 else spare
    h = 1
    while h < block:
        pairs, out = (a.reshape(-1, 2, h * x.shape[1]) for a in (y, spare))
        np.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        y, spare = spare, other if y is x else y
        h *= 2
    return np.multiply(y, 1.0 / math.sqrt(block), out=spare)


def _reflect(x: F64, p: int) -> None:
    """Householder reflection I - (2/p) 11^T along the middle axis of (n, p, m), in place."""
    total = x[:, 0].copy()
    for i in range(1, p):
        total += x[:, i]
    total *= 2.0 / p
    x -= total[:, None]


def rotate_residual(x: F64, signs: F64) -> F64:
    """The fixed rotation of the residual stream along the first axis: signs, reflections of the odd part, Hadamard.

    Shapes: (width, n) -> (width, n); `signs` is `rotation_signs(width)`. With width = p1 * p2 * ... * 2**a and index
    (p1, p2, ..., block), every factor of the Kronecker product mixes its own axis.
    """
    width, n = x.shape
    block = largest_power_of_two_divisor(width)
    y = x * signs[:, None]
    before, after = 1, width // block
    for p in prime_factors(width // block):
        after //= p
        _reflect(y.reshape(before, p, after * block * n), p)
        before *= p
    return hadamard_normalised(y, block)
