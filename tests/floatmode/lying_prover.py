"""A floating-point prover that lies in the way its argument names."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from veriattn.errors import VeriattnError
from veriattn.floatmode import prover
from veriattn.floatmode.link import FloatLink

LIE = sys.argv[1]


class Liar(prover.FloatProver):
    """Large changes of one value, in the layer 1 of two."""

    def linear(self, request: Any) -> Any:
        y = super().linear(request)
        if request.layer == 1 and LIE == "linear":
            y[0, 3] += 0.5
        return y[:, :-1] if LIE == "short" else y

    def attend(self, request: Any) -> Any:
        for what, *values in super().attend(request):
            if request.layer == 1 and what == "tile" and LIE in ("exp", "zero"):
                e = np.array(values[1])
                e[0, 0, 0] = 0.0 if LIE == "zero" else e[0, 0, 0] * 1.5
                values[1] = e
            if request.layer == 1 and what == "outputs" and LIE == "outputs":
                values[0][0, 0, 0] += 0.5
            yield what, *values

    def scores(self, request: Any) -> Any:
        s = super().scores(request)
        if request.layer == 1 and LIE == "scores":
            s[0, 0, 0] += 0.5
        return s

    def values(self, p: Any) -> Any:
        o = super().values(p)
        if LIE == "values":
            o[0, 0, 0] += 0.5
        return o


try:
    prover.serve(FloatLink.inherited(), Liar)
except VeriattnError:
    sys.exit(0)
