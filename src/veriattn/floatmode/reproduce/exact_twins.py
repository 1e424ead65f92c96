"""The same attacks against exact numerics, at their least possible size, over real sessions with lying provers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from veriattn.redteam.campaign import run

#: The attack on a tolerance, and the smallest lie of that kind that integers know.
TWINS = {
    "one weight": "consistent_scores/one",
    "pair": "consistent_scores/pair",
    "one U row": "plus_one/attention",
    "cancelling pair in U": "cancelling_pair/attention",
    "last claim": "plus_one/lm_head",
    "every layer, o": "plus_one/o",
    "every layer, down": "plus_one/down",
}


def measure(model: Path, trials: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Sessions, rejections and false rejects per attack; each session has new secrets and ends at its first reject."""
    count = max(1, min(trials, 1000) // len(TWINS))
    out: dict[str, Any] = {"trials": 0, "detections": 0, "attacks": {}, "honest": {"checks": 0, "false_rejects": 0}}
    for name, attack in TWINS.items():
        note(f"exact numerics: {name}")
        result = run(model, count, 0, [attack])
        tally = result["attacks"][attack]
        out["attacks"][name] = {"attack": attack, **tally}
        out["trials"] += tally["trials"]
        out["detections"] += tally["detections"]
        out["honest"]["checks"] += result["honest"]["checks"]
        out["honest"]["false_rejects"] += result["honest"]["false_rejects"]
        out["failures"] = out.get("failures", 0) + result["failures"]
    return out
