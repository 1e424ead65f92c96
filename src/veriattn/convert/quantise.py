"""Per-row int8 weights with a clipping search whose outcome does not depend on the machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from veriattn.convert.rotation import F64
from veriattn.errors import ModelError
from veriattn.spec.constants import SCALE_MAX, SCALE_MIN

#: Fractions of the row's absmax that are tried as the clipping point, in order; the first best wins.
CLIP_FRACTIONS = tuple(1.0 - 0.025 * i for i in range(13))
_CHUNK_ELEMENTS = 1 << 17


def _quantise_chunk(w: F64) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    peak = np.maximum(np.max(np.abs(w), axis=1), float(SCALE_MIN) * 127)
    best_error = np.full(w.shape[0], np.inf)
    best_scale = np.zeros(w.shape[0], np.float32)
    for fraction in CLIP_FRACTIONS:
        scale = np.maximum((peak * fraction / 127.0).astype(np.float32), SCALE_MIN)
        z = w * (1.0 / scale.astype(np.float64))[:, None]
        z -= np.clip(np.rint(z), -127, 127)
        z *= z
        z *= 65536.0
        # Integers add up the same way in any order; floats do not.
        units = np.sum(np.rint(z).astype(np.int64), axis=1)
        error = units.astype(np.float64) * (scale.astype(np.float64) * scale.astype(np.float64))
        better = error < best_error
        best_error[better] = error[better]
        best_scale[better] = scale[better]
    if bool(np.any(best_scale > SCALE_MAX)):
        raise ModelError("a weight row is too large for the canonical numerics (scale above 2**20)")
    q = np.clip(np.rint(w * (1.0 / best_scale.astype(np.float64))[:, None]), -127, 127)
    return q.astype(np.int8), best_scale


def quantise_rows(w: F64, pool: ThreadPoolExecutor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 rows and their scales, minimising each row's squared error over `CLIP_FRACTIONS`.

    Shapes: (out, in) -> (out, in), (out,). Rows are independent, so threads cannot change the result.
    """
    rows = max(1, _CHUNK_ELEMENTS // w.shape[1])
    chunks = [w[i : i + rows] for i in range(0, w.shape[0], rows)]
    parts = list(pool.map(_quantise_chunk, chunks))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
