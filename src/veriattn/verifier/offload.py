"""Which part of the keys that the prover cannot hold is streamed to it: a small controller with no side effects.

Both sides work at the same time: the prover on p of the non-resident keys (which must cross the link), the verifier on the
rest. The step ends when the slower one is done, so the best p makes both take equally long. Costs per key are estimated from
a short window of measurements; p moves part of the way towards the balance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Share of the way to the balance that one update goes, and weight of the newest measurement in the estimates.
STEP = 0.5
BLEND = 0.4
#: p stays this far from both ends, so that both costs go on being measured.
MARGIN = 0.02
#: Changes smaller than this are not worth a change of blocks.
DEAD_BAND = 0.01


@dataclass(frozen=True)
class Measurement:
    """One step: keys (times layers) on either side and the seconds that each side took for them."""

    prover_keys: int
    prover_s: float
    tee_keys: int
    tee_s: float


@dataclass(frozen=True)
class Controller:
    """State of the controller; `update` returns the next one. Costs in seconds per key, None until measured."""

    ratio: float = 0.5
    prover_cost: float | None = None
    tee_cost: float | None = None

    def update(self, m: Measurement) -> Controller:
        """Take a measurement in. Unmeasured sides (no keys) leave their cost as it was."""
        prover = _blend(self.prover_cost, m.prover_s, m.prover_keys)
        tee = _blend(self.tee_cost, m.tee_s, m.tee_keys)
        state = replace(self, prover_cost=prover, tee_cost=tee)
        if prover is None or tee is None or prover + tee <= 0:
            return state
        balance = min(max(tee / (prover + tee), MARGIN), 1.0 - MARGIN)
        if abs(balance - self.ratio) < DEAD_BAND:
            return state
        return replace(state, ratio=self.ratio + STEP * (balance - self.ratio))


def _blend(cost: float | None, seconds: float, keys: int) -> float | None:
    if keys <= 0 or seconds <= 0.0:
        return cost
    new = seconds / keys
    return new if cost is None else (1.0 - BLEND) * cost + BLEND * new
