"""Changes just below the tolerance, in one claim or in every layer, that turn the greedy token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from veriattn.convert.checkpoint import F32
from veriattn.floatmode.checks import generator
from veriattn.floatmode.engine import FloatConfig, FloatModel, linear_secrets
from veriattn.floatmode.params import kind_of
from veriattn.floatmode.prover import FloatProver
from veriattn.floatmode.reproduce.local_link import open_local
from veriattn.floatmode.requests import Linear

#: Size of a lie over the tolerance of its check: |N(0, size)| stays below it in nearly all draws.
SHARE = 0.3


class Steering(FloatProver):
    """Adds to the last row of `o`, `down` and `lm_head` what moves the residual stream from one token's logit to another's."""

    limits: dict[str, float]
    where = "none"  # or `head`, `all`
    toward: F32  # direction in the residual stream, unit norm
    pair: tuple[int, int]  # tokens to lower and to raise

    def linear(self, request: Linear) -> Any:
        y = super().linear(request)
        if self.where == "none":
            return y
        size = np.float32(SHARE * self.limits[request.name])
        y = np.array(y)
        if request.name == "lm_head":
            y[-1, self.pair[0]] -= size / np.float32(np.sqrt(2))
            y[-1, self.pair[1]] += size / np.float32(np.sqrt(2))
        elif self.where == "all" and request.name in ("o", "down"):
            y[-1] += size * self.toward
        return self.arithmetic.put(y)


def measure(
    model: FloatModel,
    config: FloatConfig,
    honest: FloatProver,
    limits: dict[str, float],
    ids: Sequence[int],
    tokens: int,
) -> dict[str, Any]:
    """At each of the last `tokens` positions: honest logits, then the same step under each lie, with fresh secrets.

    A lie counts where every check of the step passed and the greedy token became the second choice. The direction is the
    difference of the two rows of lm_head behind the final norm (no gradient): a simple attacker, not the best one.
    """
    prover = Steering.__new__(Steering)
    prover.__dict__.update(honest.__dict__)
    prover.limits = limits
    rejected = False

    def judge(key: str, residual: float) -> bool:
        nonlocal rejected
        rejected |= not residual <= limits[kind_of(key)]
        return True

    ops, _ = open_local(model, config, judge, prover)
    sets = linear_secrets(model, config, generator(), 8)
    head, norm = model.kept(model.config.num_layers, "lm_head"), model.norm
    counts = {key: {"flipped": 0, "rejected": 0} for key in ("none", "head", "all")}
    margins, moved = [], {"head": [], "all": []}  # type: ignore[var-annotated]
    prompt = len(ids) - tokens
    model.forward(ops, ids[:prompt])
    for n in range(prompt, len(ids)):
        ops.linears = sets[n % len(sets)]
        for where in ("none", "head", "all"):
            prover.where, rejected = where, False
            logits = model.forward(ops, [ids[n]])
            ops.rewind(1)
            if where == "none":
                second, first = (int(t) for t in np.argsort(logits)[-2:])
                margin = float(logits[first] - logits[second])
                margins.append(margin)
                direction = norm * (head[second] - head[first])
                prover.toward = np.asarray(direction / np.linalg.norm(direction), np.float32)
                prover.pair = (first, second)
            else:
                moved[where].append(margin - float(logits[first] - logits[second]))
            turned = where != "none" and int(np.argmax(logits)) == second
            counts[where]["rejected"] += rejected
            counts[where]["flipped"] += turned and not rejected
        prover.where = "none"
        model.forward(ops, [ids[n]])
    return {
        "positions": tokens, "median_margin": float(np.median(margins)),
        **{
            where: {
                "flipped": counts[where]["flipped"] / tokens, "rejected": counts[where]["rejected"] / tokens,
                "median_margin_moved": float(np.median(moved[where])),
            }
            for where in ("head", "all")
        },
        "honest_rejected": counts["none"]["rejected"] / tokens,
    }  # fmt: skip
