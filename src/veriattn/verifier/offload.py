"""Which part of the keys that the prover cannot hold is streamed to it: a small controller with no side effects.

Both sides work at the same time: the prover on p of the non-resident keys (which must cross the link), the verifier on the
rest. What a p costs depends on the link, on both processors and on how much they get in each other's way; streaming nothing
saves the exchange itself, so the cost is not even continuous there. So the controller compares what was measured, layer by
layer: p is a rung of a ladder; a few rungs are tried first, then those next to the best one, and from then on others rarely,
the more rarely the worse they were. When the cost of the best rung changes for several measurements in a row, it starts over.

What a prover gains by being slow on purpose is another p in [0, 1], and time lost: no check depends on p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

_T = TypeVar("_T")

#: Rungs of the ladder: p = rung / RUNGS.
RUNGS = 16
#: Rungs that are tried first, and again from time to time.
COARSE = (8, 0, 4, 12, 16)
#: Distances from the best rung, and from the best but 0, that are tried after that: the best p may lie between coarse ones.
NEAR = (2, -2, 1, -1)
#: Weight of the newest measurement in the average cost of the best rung.
BLEND = 0.4
#: Another rung must be cheaper than the best one by this much to replace it: differences below are noise.
GAIN = 0.03
#: Measurements between two trials of rungs that are known, at least and at most; between them 1 in PATIENCE of the extra cost.
REST, LONGEST_REST, PATIENCE = 12, 1024, 300
#: A cost this far from its average, this often in a row, means that the averages are worth nothing.
CHANGE, CHANGES = 0.4, 4


@dataclass(frozen=True)
class Measurement:
    """One layer's attention over `keys` non-resident keys (times rows), whoever computed them, and the seconds it took."""

    keys: int
    seconds: float


@dataclass(frozen=True)
class Controller:
    """State of the controller; `update` returns the next one.

    rung: in use. best: cheapest known. costs: average seconds per key of each rung, None until measured. tried: number of
    the measurement that saw a rung last. surprises: how many in a row were far from the average.
    """

    rung: int = COARSE[0]
    best: int = COARSE[0]
    costs: tuple[float | None, ...] = (None,) * (RUNGS + 1)
    tried: tuple[int, ...] = (0,) * (RUNGS + 1)
    count: int = 0
    last_trial: int = 0
    surprises: int = 0

    @classmethod
    def start(cls, ratio: float) -> Controller:
        """Begin with the rung next to a ratio."""
        rung = round(min(max(ratio, 0.0), 1.0) * RUNGS)
        return cls(rung, rung)

    @property
    def ratio(self) -> float:
        """p for what comes next; now and then a trial."""
        return self.rung / RUNGS

    @property
    def best_ratio(self) -> float:
        """The p that was cheapest so far."""
        return self.best / RUNGS

    def update(self, m: Measurement) -> Controller:
        """Take in what the rung in use cost. A measurement without keys or time, or without sense, changes nothing."""
        if m.keys <= 0 or not 0.0 < m.seconds < math.inf:
            return self
        return self._measured(m.seconds / m.keys)._decided()

    def _measured(self, cost: float) -> Controller:
        known = self.costs[self.rung]
        surprises = self.surprises
        if known is not None and self.rung == self.best:
            far = cost > known * (1 + CHANGE) or cost * (1 + CHANGE) < known
            surprises = surprises + 1 if far else 0
        if surprises >= CHANGES:
            fresh = Controller(self.rung, self.rung, count=self.count, last_trial=self.count)
            return fresh._measured(cost)
        # A trial is compared as it is: what its rung cost long ago may have been on another link.
        blend = BLEND if known is not None and self.rung == self.best else 1.0
        average = cost if known is None else (1.0 - blend) * known + blend * cost
        count = self.count + 1
        return replace(
            self,
            costs=_with(self.costs, self.rung, average),
            tried=_with(self.tried, self.rung, count),
            count=count,
            surprises=surprises,
        )

    def _decided(self) -> Controller:
        best = self.best
        for rung, cost in enumerate(self.costs):
            current = self.costs[best]
            # Within the margin the one in place stays; but of others, the cheapest replaces it.
            if cost is not None and (current is None or cost < current * (1 - GAIN if best == self.best else 1)):
                best = rung
        # Nothing streamed may be cheaper than every coarse rung, and still not than the best of those between them.
        streaming = min(range(1, RUNGS + 1), key=lambda r: math.inf if (cost := self.costs[r]) is None else cost)
        near = [r for at in dict.fromkeys((best, streaming)) for n in NEAR if 0 <= (r := at + n) <= RUNGS]
        for rung in (*COARSE, *near):
            if self.costs[rung] is None:
                return replace(self, best=best, rung=rung, last_trial=self.count)
        due = [r for r in (*near, *COARSE) if r != best and self.count - self.tried[r] >= self._rest(r, best)]
        if due and self.count - self.last_trial >= REST:
            rung = min(due, key=lambda r: self.tried[r])
            return replace(self, best=best, rung=rung, last_trial=self.count)
        return replace(self, best=best, rung=best)

    def _rest(self, rung: int, best: int) -> float:
        """Measurements until a known rung is worth another try: what a try costs is spread over them."""
        cost, least = self.costs[rung], self.costs[best]
        if cost is None or least is None:
            return 0
        return min(max(REST, PATIENCE * (cost / least - 1)), LONGEST_REST)


def _with(values: tuple[_T, ...], index: int, value: _T) -> tuple[_T, ...]:
    return (*values[:index], value, *values[index + 1 :])
