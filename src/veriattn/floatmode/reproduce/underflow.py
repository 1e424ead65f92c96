"""Where half precision underflows or overflows, and which honest rows a check must therefore reject."""

from __future__ import annotations

from typing import Any

import numpy as np

from veriattn.floatmode.checks import generator
from veriattn.floatmode.engine import FloatModel
from veriattn.floatmode.formats import rounded
from veriattn.floatmode.params import FORMATS, Format
from veriattn.floatmode.reproduce.heads import capture, claims
from veriattn.floatmode.reproduce.prompts import token_ids
from veriattn.floatmode.requests import Shift

TOKENS, KEYS = 256, 512
RANGES = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 60, 80, 90, 100, 120)


def unusable(e: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Which rows see a value that is not positive, finite and normal (as float32). e (keys, rows) -> (rows,)."""
    seen = np.arange(e.shape[0])[:, None] < visible
    return np.asarray(np.any(seen & ~((e >= np.finfo(np.float32).tiny) & (e < np.inf)), axis=0))


def sweep(trials: int) -> list[dict[str, Any]]:
    """Honest rows with scores spread over [-r, 0] (shifted by their maximum) or [-r/2, r/2] (not shifted, as printed)."""
    rng, out = generator(), []
    for spread in RANGES:
        row: dict[str, Any] = {"range": spread}
        s = spread * rng.random((KEYS, trials), np.float32)
        with np.errstate(over="ignore"):
            for fmt in FORMATS:
                visible = np.full(trials, KEYS)
                shifted = rounded(np.exp(s - s.max(axis=0)), fmt)
                plain = rounded(np.exp(s - spread / 2), fmt)
                row[fmt] = {
                    "max": float(unusable(shifted, visible).mean()),
                    "none": float(unusable(plain, visible).mean()),
                }
        out.append(row)
    return out


def measure(model: FloatModel, text: str, trials: int) -> dict[str, Any]:
    """The sweep, and the share of the model's own rows, layer by layer."""
    heads = capture(model, token_ids(model, text, TOKENS)[:TOKENS])
    own: dict[str, dict[str, list[float]]] = {}
    shifts: tuple[Shift, ...] = ("max", "none")
    for fmt in FORMATS:
        own[fmt] = {}
        for shift in shifts:
            layers: dict[int, list[float]] = {}
            for head in heads:
                layers.setdefault(head.layer, []).append(_rejected(head.in_format(fmt), fmt, shift))
            own[fmt][shift] = [float(np.mean(layers[layer])) for layer in sorted(layers)]
    return {
        "keys": KEYS, "rows": trials, "sweep": sweep(min(trials, 200)), "model_digest": model.source.digest(),
        "model_tokens": TOKENS, "model_rows_rejected_by_layer": own,
        "model_rows_rejected": {f: {s: float(np.mean(v)) for s, v in by.items()} for f, by in own.items()},
    }  # fmt: skip


def _rejected(head: Any, fmt: Format, shift: Shift) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        c = claims(head, 0, head.tokens, fmt, fmt, shift)
    return float(unusable(c.tile.e, c.tile.visible).mean())


def plot(data: dict[str, Any], figure: Any) -> None:
    """Share of honest rows that no tolerance can accept."""
    left, right = figure.subplots(1, 2)
    for i, fmt in enumerate(FORMATS):
        for shift, style in (("max", "o-"), ("none", "x:")):
            left.plot([r["range"] for r in data["sweep"]], [r[fmt][shift] for r in data["sweep"]], style, ms=3, color=f"C{i}",
                      label=f"{fmt}, shift {shift}")  # fmt: skip
            right.plot(data["model_rows_rejected_by_layer"][fmt][shift], style, ms=3, color=f"C{i}")
    left.set(xlabel="range of a row's scores", ylabel="honest rows rejected")
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="layer", title="the model's own rows")
