"""Floating-point formats: rounding to them, and how arrays of them travel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.convert.checkpoint import F32
from veriattn.floatmode.params import Format

Array = npt.NDArray[Any]

#: What a value takes on the wire; bfloat16 travels as the upper half of a float32.
WIRE: dict[Format, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}
#: Unit roundoff: half the distance from 1 to the next number.
ROUNDOFF: dict[Format, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8 / 2, "float16": 2.0**-11}


def encode(x: Array, fmt: Format) -> Array:
    """float32 to wire values of `fmt`, to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    if fmt == "float32":
        return x
    if fmt == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(np.float16)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding would carry a NaN's payload into the sign.
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def decode(raw: Array, fmt: Format) -> F32:
    """Wire values to float32, exactly."""
    if fmt == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32, copy=False)


def rounded(x: Array, fmt: Format) -> F32:
    """float32 values that `fmt` has."""
    return decode(encode(x, fmt), fmt)
