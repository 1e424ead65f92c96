"""Per-row int8 weights with a clipping search whose outcome does not depend on the machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from veriattn.convert.rotation import F64
from veriattn.errors import ModelError
from veriattn.spec.constants import MAX_IN_FEATURES, SCALE_MAX, SCALE_MIN

#: Fractions of the row's absmax that are tried as the clipping point, in order; the first best wins.
CLIP_FRACTIONS = tuple(1.0 - 0.025 * i for i in range(13))


def quantise_rows(w: F64) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 rows and their scales, minimising each row's squared error over `CLIP_FRACTIONS`.

    Shapes: (out, in) -> (out, in), (out,). Bounds: in <= 131071. Rows do not depend on each other.
    Raises: ModelError for a row with a scale above 2**20, or that is not finite.
    """
    if w.shape[1] > MAX_IN_FEATURES:
        raise ModelError(f"a linear with {w.shape[1]} inputs; at most {MAX_IN_FEATURES} are supported")
    z, r = np.empty(w.shape), np.empty(w.shape)
    peak = np.max(np.abs(w, out=z), axis=1)
    # Written so that NaN fails it too.
    if not bool(np.all(peak <= float(SCALE_MAX) * 127)):
        raise ModelError(
            "a weight row is not finite or too large for the canonical numerics (scale above 2**20)",
            hint="the checkpoint is damaged, or of a model that int8 cannot hold",
        )
    peak = np.maximum(peak, float(SCALE_MIN) * 127)
    best_error = np.full(w.shape[0], np.inf)
    best_scale = np.zeros(w.shape[0], np.float32)
    for fraction in CLIP_FRACTIONS:
        scale = np.maximum((peak * fraction / 127.0).astype(np.float32), SCALE_MIN)
        wide = scale.astype(np.float64)
        np.multiply(w, (1.0 / wide)[:, None], out=z)
        _round_i8(z, r)
        z -= r
        z *= z
        z *= 65536.0
        np.rint(z, out=z)
        # Whole numbers: |z - r| < 55 keeps each below 2**28 and 131071 of them below 2**53. Any order gives this sum.
        error = np.sum(z, axis=1) * (wide * wide)
        better = error < best_error
        best_error[better] = error[better]
        best_scale[better] = scale[better]
    np.multiply(w, (1.0 / best_scale.astype(np.float64))[:, None], out=z)
    return _round_i8(z, r).astype(np.int8), best_scale


def _round_i8(z: F64, out: F64) -> F64:
    np.rint(z, out=out)
    return np.clip(out, -127.0, 127.0, out=out)
