"""Which part of the keys that the prover cannot hold is streamed to it: a small controller with no side effects.

Both sides work at the same time: the prover on p of the non-resident keys (which must cross the link), the verifier on the
rest. What a p costs depends on the link, on both processors and on how much they get in each other's way; streaming nothing
saves the exchange itself, so the cost is not even continuous there. So the controller compares what was measured, layer by
layer: p is a rung of a ladder; a few rungs are tried first, then those next to the best one, and from then on others rarely,
the more rarely the worse they were. When the cost of the best rung changes for several measurements in a row, all are tried
again.

Machines are shared: measurements scatter, some are much too long, and for moments all are. So a trial takes two measurements,
of which the lesser counts beside the best rung's last two; a rung that then seems cheaper is measured on, until the medians
of eight say so as well.

What a prover gains by being slow on purpose is another p in [0, 1], and time lost: no check depends on p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

_T = TypeVar("_T")

#: Rungs of the ladder: p = rung / RUNGS.
RUNGS = 16
#: Rungs that are tried first, and again from time to time.
COARSE = (8, 0, 4, 12, 16)
#: Distances from the best rung, and from the best but 0, that are tried after that: the best p may lie between coarse ones.
NEAR = (2, -2, 1, -1)
#: Measurements of a trial, and of one whose rung seems cheaper than the best one.
TRIAL, CONFIRMED = 2, 8
#: Another rung must be cheaper than the best one by this much to replace it: differences below are noise.
GAIN = 0.03
#: Measurements between two trials of rungs that are known, at least and at most; between them 1 in PATIENCE of the extra cost.
REST, LONGEST_REST, PATIENCE = 12, 1024, 450
#: Weight of the newest measurement in the average that tells a change: a cost this far from it, this often in a row.
BLEND, CHANGE, CHANGES = 0.4, 0.4, 40
#: Seconds per key beyond which no clock tells anything: costs are divided, and by each other.
LEAST, MOST = 1e-15, 1e15


@dataclass(frozen=True)
class Measurement:
    """One layer's attention over `keys` non-resident keys (times rows), whoever computed them, and the seconds it took."""

    keys: int
    seconds: float


@dataclass(frozen=True)
class Controller:
    """State of the controller; `update` returns the next one.

    rung: in use. best: cheapest known. ratios: cost of each rung over that of the best, None until tried. recent: last
    seconds per key of the best rung; trial: of the rung that is being tried. tried: number of the measurement that saw a rung
    last. usual: average of the best rung, without what is far from it. surprises: how many in a row were.
    """

    rung: int = COARSE[0]
    best: int = COARSE[0]
    ratios: tuple[float | None, ...] = (None,) * (RUNGS + 1)
    recent: tuple[float, ...] = ()
    trial: tuple[float, ...] = ()
    tried: tuple[int, ...] = (0,) * (RUNGS + 1)
    count: int = 0
    last_trial: int = 0
    usual: float | None = None
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
        cost, now = min(max(m.seconds / m.keys, LEAST), MOST), replace(self, count=self.count + 1)
        return now._of_best(cost) if self.rung == self.best else now._of_trial(cost)

    def _of_best(self, cost: float) -> Controller:
        usual = cost if self.usual is None else self.usual
        far = cost > usual * (1 + CHANGE) or cost * (1 + CHANGE) < usual
        surprises = self.surprises + 1 if far else 0
        if surprises == CHANGES:
            return replace(Controller(self.best, self.best, count=self.count, last_trial=self.count), recent=(cost,))
        now = replace(
            self,
            recent=(*self.recent, cost)[-CONFIRMED:],
            usual=usual if far else (1.0 - BLEND) * usual + BLEND * cost,
            surprises=surprises,
        )
        return now if len(now.recent) < TRIAL else now._next()

    def _of_trial(self, cost: float) -> Controller:
        trial = (*self.trial, cost)
        if len(trial) < TRIAL:
            return replace(self, trial=trial)
        ratio = min(trial) / min(self.recent[-TRIAL:])
        if len(trial) > TRIAL or ratio < 1 - GAIN:
            if len(trial) < CONFIRMED:
                return replace(self, trial=trial)
            ratio = median(trial) / median(self.recent)
        tried = _with(self.tried, self.rung, self.count)
        if ratio >= 1 - GAIN:
            # Back to the best one, at least for a moment: what the next trial is compared with must be as new.
            return replace(self, rung=self.best, trial=(), ratios=_with(self.ratios, self.rung, ratio), tried=tried)
        ratios = _with(tuple(None if r is None else r / ratio for r in self.ratios), self.best, 1 / ratio)
        now = replace(
            self, best=self.rung, ratios=ratios, recent=trial, trial=(), tried=_with(tried, self.best, self.count)
        )
        return replace(now, usual=None, surprises=0)

    def _next(self) -> Controller:
        """What to try, or the best rung."""
        # Nothing streamed may be cheaper than every coarse rung, and still not than the best of those between them.
        known = [math.inf if r is None else r for r in _with(self.ratios, self.best, 1.0)]
        streaming = min(range(1, RUNGS + 1), key=known.__getitem__)
        near = [r for at in dict.fromkeys((self.best, streaming)) for n in NEAR if 0 <= (r := at + n) <= RUNGS]
        others = [r for r in dict.fromkeys((*COARSE, *near)) if r != self.best]
        for rung in others:
            if self.ratios[rung] is None:
                return replace(self, rung=rung, last_trial=self.count)
        due = [r for r in others if self.count - self.tried[r] >= self._rest(r)]
        if due and self.count - self.last_trial >= REST:
            return replace(self, rung=min(due, key=lambda r: self.tried[r]), last_trial=self.count)
        return self

    def _rest(self, rung: int) -> float:
        """Measurements until a known rung is worth another try: what a try costs is spread over them."""
        ratio = self.ratios[rung]
        return 0.0 if ratio is None else min(max(REST, PATIENCE * (ratio - 1)), LONGEST_REST)


def _with(values: tuple[_T, ...], index: int, value: _T) -> tuple[_T, ...]:
    return (*values[:index], value, *values[index + 1 :])
