"""Orthogonal transforms folded into weights, in binary64 with a fixed order of operations.

Only `+ - * /` and `sqrt` on whole arrays are used: no BLAS, no reductions over floats, so two machines get the same bits.
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
    """Fixed signs of the residual rotation: bits of SHA-256("veriattn/rotation/1" || counter)."""
    bits: list[int] = []
    counter = 0
    while len(bits) < size:
        digest = hashlib.sha256(b"veriattn/rotation/1" + counter.to_bytes(4, "little")).digest()
        bits.extend((byte >> i) & 1 for byte in digest for i in range(8))
        counter += 1
    return 1.0 - 2.0 * np.array(bits[:size], dtype=np.float64)


def hadamard_normalised(x: F64, block: int) -> F64:
    """Orthonormal Walsh-Hadamard transform of each `block` of the last axis."""
    y = np.ascontiguousarray(x, dtype=np.float64).reshape(-1, block)
    h = 1
    while h < block:
        pairs = y.reshape(-1, block // (2 * h), 2, h)
        out = np.empty_like(pairs)
        np.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        y = out.reshape(-1, block)
        h *= 2
    return (y * (1.0 / math.sqrt(block))).reshape(x.shape)


def _reflect(x: F64, size: int) -> F64:
    """Householder reflection I - (2/p) 11^T along axis 1 of (n, p, m)."""
    total = x[:, 0].copy()
    for i in range(1, size):
        total += x[:, i]
    return x - ((2.0 / size) * total)[:, None]


def rotate_residual(x: F64) -> F64:
    """Apply the fixed rotation of the residual stream to the last axis: signs, reflections of the odd part, Hadamard.

    With width = 2**a * p1 * p2 ..., index = (block, p1, p2, ...): every factor of the Kronecker product mixes its own axis.
    """
    width = x.shape[-1]
    block = largest_power_of_two_divisor(width)
    rows = int(np.prod(x.shape[:-1], dtype=np.int64))
    y = (x * rotation_signs(width)).reshape(rows, width)
    before, after = 1, width // block
    for p in prime_factors(width // block):
        after //= p
        y = _reflect(y.reshape(rows * before, p, after * block), p)
        before *= p
    return hadamard_normalised(y.reshape(-1, block), block).reshape(x.shape)
