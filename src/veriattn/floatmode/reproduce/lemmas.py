"""Lemmas 1 and 2: how often a wrong claim passes, measured, beside the bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from veriattn.floatmode.checks import coefficients, generator, lemma1_bound, lemma2_bound, lp_residuals, lp_worst
from veriattn.floatmode.formats import ROUNDOFF, rounded
from veriattn.floatmode.params import CheckParams, Format

FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16")


def lemma1(trials: int) -> list[dict[str, Any]]:
    """U + error against E (V w): an error of norm sigma in one row, accepted where |residual| <= ratio * sigma."""
    rng, out = generator(), []
    for fmt in FORMATS:
        for keys in (64, 1024):
            for tau in (1, 2, 3):
                for ratio in (0.25, 1.0, 2.0):
                    d = 64
                    e = rounded(rng.random((4, keys), np.float32), fmt)
                    v = rounded(rng.standard_normal((keys, d), np.float32), fmt)
                    u = rounded(e @ v, fmt)
                    w = rng.standard_normal((d, trials * tau), np.float32)
                    clean = float(np.abs(u @ w - e @ (v @ w)).max())
                    error = rng.standard_normal(d).astype(np.float32)
                    error *= np.float32(50 * clean) / np.linalg.norm(error)  # well above what rounding does
                    claimed = u.copy()
                    claimed[2] = rounded(u[2] + error, fmt)
                    sigma = float(np.linalg.norm(claimed[2] - e[2] @ v))
                    residual = np.abs(claimed @ w - e @ (v @ w)).max(axis=0).reshape(trials, tau).max(axis=1)
                    accepted = float(np.mean(residual <= ratio * sigma))
                    out.append({
                        "format": fmt, "keys": keys, "repetitions": tau, "tolerance_over_sigma": ratio,
                        "accepted": accepted, "bound": lemma1_bound(ratio, 1.0, tau),
                    })  # fmt: skip
    return out


def lemma2(trials: int) -> list[dict[str, Any]]:
    """Errors of +x, -x (and one of +x alone) in the logarithms of a row: they cancel where coefficients are equal."""
    rng, out = generator(), []
    x = 4.0
    for fmt in FORMATS:
        for keys in (64, 512, 4096) if fmt == "float32" else (64,):
            for n_a in (2, 4, 16, 64):
                for tau_a in (1, 2):
                    for errors in (1, 2):
                        params = CheckParams(n_a=n_a, tau_a=tau_a, tau_g=4)
                        s = -4 * rng.random(keys)
                        y = rounded(np.exp(s).astype(np.float32), fmt)[:, None]
                        visible = np.array([keys], np.int32)
                        # The tolerance: twice what an honest row leaves at worst with these coefficients.
                        eps = 2 * 4 * n_a * math.sqrt(keys) * 2 * max(ROUNDOFF[fmt], 2.0**-23)
                        i, j = rng.choice(keys, 2, replace=False)
                        y[i] = rounded(y[i] * np.float32(math.exp(x)), fmt)
                        if errors == 2:
                            y[j] = rounded(y[j] * np.float32(math.exp(-x)), fmt)
                        accepted = 0
                        for _ in range(trials):
                            passes = True
                            for a in coefficients(rng, keys, params):
                                r = lp_residuals(y, a, visible, np.array([a @ s]))
                                passes = passes and lp_worst(r, rng, params.tau_g) <= eps
                            accepted += passes
                        out.append({
                            "format": fmt, "keys": keys, "n_a": n_a, "tau_a": tau_a, "tau_g": params.tau_g, "errors": errors,
                            "tolerance": eps, "accepted": accepted / trials, "bound": lemma2_bound(eps, x, errors, params),
                        })  # fmt: skip
    return out


def excess(rows: list[dict[str, Any]], trials: int) -> float:
    """How far the worst measured rate lies above its bound, in standard errors of a rate at the bound."""
    worst = -math.inf
    for row in rows:
        error = math.sqrt(max(row["bound"] * (1 - row["bound"]), 1 / trials) / trials)
        worst = max(worst, (row["accepted"] - row["bound"]) / error)
    return worst


def measure(trials: int) -> dict[str, Any]:
    """Both lemmas."""
    first, second = lemma1(20 * trials), lemma2(trials)
    return {
        "trials": {"lemma1": 20 * trials, "lemma2": trials},
        "lemma1": first, "lemma2": second,
        "worst_excess_in_standard_errors": {"lemma1": excess(first, 20 * trials), "lemma2": excess(second, trials)},
    }  # fmt: skip


def plot(data: dict[str, Any], figure: Any) -> None:
    """Measured against bound; on or below the diagonal is what the lemmas promise."""
    for axes, name in zip(figure.subplots(1, 2), ("lemma1", "lemma2"), strict=True):
        least = 0.3 / data["trials"][name]
        for i, fmt in enumerate(FORMATS):
            rows = [r for r in data[name] if r["format"] == fmt]
            axes.plot([max(r["bound"], least) for r in rows], [max(r["accepted"], least) for r in rows], "o", ms=4,
                      color=f"C{i}", label=fmt, alpha=0.7)  # fmt: skip
        axes.plot([least, 1], [least, 1], "k:", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="bound", ylabel="measured false accepts", title=name)
        axes.legend(frameon=False)
