"""The log-product of floating-point attention weights, for `veriattn.floatmode`. Nothing exact uses it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from veriattn.native import _native
from veriattn.native.kernels import _checked
from veriattn.spec.reference import F32, I32


@_checked
def log_product(y: F32, a: I32, visible: I32) -> npt.NDArray[np.float64]:
    """log prod_i y_i^(a_i) of every column over the keys that it sees, with one logarithm each.

    NaN where a value that is seen is not positive, finite and normal. Products are held as m * 2**e.
    Shapes: y (keys, columns), a (keys,), visible (columns,) -> (columns,). Bounds: keys <= 131072, a in 1 .. 4096.
    """
    out = np.empty(y.shape[1], np.float64)
    _native.float_log_product(y, a, visible, out)
    return out
