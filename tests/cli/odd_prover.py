"""The built-in prover with another will.

`slow FILE` sleeps before each step and makes the file at the fifth; `lie AT` changes one claim of the AT-th step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from veriattn.prover import cpu
from veriattn.prover.__main__ import main

MODE, *REST = sys.argv[1:]
del sys.argv[1:]
honest_step = cpu.CpuBackend.step
steps = 0


class LyingSink:
    """Adds one to one element of one claim."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def claim(self, name: str, values: Any) -> None:
        if name == "layers.1.o":
            values = values.copy()
            values[-1, 3] += 1
        self._sink.claim(name, values)


def step(self: Any, batch: Any, check: Any, sink: Any) -> Any:
    global steps  # noqa: PLW0603
    steps += 1
    if MODE == "slow":
        time.sleep(0.05)
        if steps == 5:
            Path(REST[0]).touch()
    lying = MODE == "lie" and steps == int(REST[0])
    return honest_step(self, batch, check, LyingSink(sink) if lying else sink)


cpu.CpuBackend.step = step  # type: ignore[method-assign]
sys.exit(main())
