"""Adaptive attacks on the tolerances: what a prover that knows them can change unnoticed.

The attacker knows the model, the activations, the parameters and the calibrated tolerances; it does not know the challenges.
Its other claims are made to agree with the lie (U is computed from the changed E), as any real attacker's would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from veriattn.floatmode.calibrate import calibration_prompts
from veriattn.floatmode.checks import gaussian, generator, gvfa_residual, lp_worst
from veriattn.floatmode.engine import FloatConfig, FloatModel
from veriattn.floatmode.formats import rounded
from veriattn.floatmode.params import CheckParams, Format
from veriattn.floatmode.prover import FloatProver
from veriattn.floatmode.reproduce import steering
from veriattn.floatmode.reproduce.heads import Claims, Head, capture, claims
from veriattn.floatmode.reproduce.local_link import calibrated, hello_of
from veriattn.floatmode.reproduce.prompts import token_ids
from veriattn.floatmode.trusted import AttentionSecrets, with_ones

FORMATS: tuple[tuple[Format, Format], ...] = (
    ("float32", "float32"),
    ("float16", "float32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
)
TOKENS, STEER_TOKENS, DRAWS, EVERY = 128, 20, 100, 4
LEARN_KEYS, FORGERIES = 64, 1000


class Target:
    """The last row of one query head with its keys, honest claims, and the real checks on what is claimed instead."""

    def __init__(
        self, head: Head, formats: tuple[Format, Format], limits: dict[str, float], params: CheckParams
    ) -> None:
        self.head, self.params, self.formats = head.in_format(formats[0]), params, formats
        self.limit_exp, self.limit_values = limits["exp"], limits["values"]
        self.rng = generator()
        self.start = self.head.tokens - 1
        self.honest: Claims = claims(self.head, self.start, self.head.tokens, *formats)
        self.scale = head.k.shape[1] ** -0.5

    @property
    def e(self) -> np.ndarray:
        """Honest weights of the first query head's row, (keys,)."""
        return np.array(self.honest.tile.e[:, 0])

    @property
    def usable(self) -> bool:
        """Whether an honest row can pass at all."""
        return bool(np.all(self.honest.tile.e > 0))

    def secrets(self) -> AttentionSecrets:
        """Fresh challenges."""
        return AttentionSecrets.draw(self.rng, self.head.k, self.head.v, self.start, self.params)

    def accepts(self, e: np.ndarray, u: np.ndarray | None = None, secrets: AttentionSecrets | None = None) -> bool:
        """Both checks on a changed row, U made from it unless given."""
        s = secrets or self.secrets()
        tile = self.honest.tile
        weights = np.array(tile.e)
        weights[:, 0] = e
        outputs = np.array(self.honest.u)
        outputs[0] = rounded(rounded(e, self.formats[1]) @ self.head.v if u is None else u, self.formats[0])
        changed = type(tile)(rounded(weights, self.formats[1]), tile.shift, tile.q, tile.visible)
        worst = max(lp_worst(r, self.rng, self.params.tau_g) for r in s.residuals(changed, self.scale))
        if not worst <= self.limit_exp:
            return False
        return gvfa_residual(outputs, s.w, s.outputs(changed)[:, :-1]) <= self.limit_values

    def rate(self, e: np.ndarray, u: np.ndarray | None = None, draws: int = DRAWS) -> float:
        """Share of fresh challenges under which the claim passes."""
        return sum(self.accepts(e, u) for _ in range(draws)) / draws

    def output(self, e: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        """What attention gives for these claims."""
        return np.asarray((e @ self.head.v if u is None else u) / e.sum())


def largest(passes: Callable[[float], bool], low: float, high: float, steps: int = 10) -> float:
    """Bisection in the logarithm: a size near the largest for which `passes`; 0 where not even the least does."""
    if not passes(low):
        return 0.0
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def _moved(target: Target, e: np.ndarray, u: np.ndarray | None = None) -> float:
    honest = target.output(target.e)
    return float(np.linalg.norm(target.output(e, u) - honest) / np.linalg.norm(honest))


def one_weight(target: Target) -> dict[str, float]:
    """The largest factor 1 + x on the heaviest weight of a row that passes at least every other time."""

    def changed(x: float) -> np.ndarray:
        e = target.e
        e[int(np.argmax(e))] *= np.float32(1 + x)
        return e

    x = largest(lambda x: target.rate(changed(x), draws=40) >= 0.5, 1e-6, 1e3)
    return {"change": x, "output": _moved(target, changed(x))}


def pair(target: Target) -> dict[str, float]:
    """The heaviest weight times e^5 and the next divided by it: passes where both have the same coefficient, 1 in n_a."""
    e = target.e
    first, second = np.argsort(e)[::-1][:2]
    top = e.copy()
    top[second] *= np.float32(math.exp(5))
    top[first] *= np.float32(math.exp(-5))
    rate = target.rate(top, draws=5 * DRAWS)

    def changed(x: float) -> np.ndarray:
        out = target.e
        out[second] *= np.float32(1 + x)
        out[first] /= np.float32(1 + x)
        return out

    x = largest(lambda x: target.rate(changed(x), draws=40) >= 0.5, 1e-6, 1e3)
    return {"change": x, "output": _moved(target, changed(x)), "rate_at_e5": rate, "output_at_e5": _moved(target, top)}


def small_row(heads: list[Head], formats: tuple[Format, Format], params: CheckParams) -> dict[str, Any]:
    """Change U of the row with the smallest Z, under E = exp(S) as printed and under E = exp(S - max).

    One tolerance holds for all rows of a layer, and a row with small Z divides by little.
    """
    rng, out = generator(), {}
    for shift in ("none", "max"):
        worst: dict[str, float] = {"output": 0.0, "z": math.nan, "change": 0.0}
        for head in heads:
            local = head.in_format(formats[0])
            with np.errstate(all="ignore"):
                c = claims(local, 0, local.tokens, *formats, shift)
                tile = c.tile
                tile.clear_masked()
                z = tile.e.sum(axis=0)
            if not (np.isfinite(c.u).all() and np.isfinite(z).all() and (z > 0).all()):
                continue
            limit = 0.0
            for _ in range(params.calibration_runs):
                w = gaussian(rng, local.v.shape[1], params.repetitions)
                expected = tile.e.T @ with_ones(local.v @ w)
                limit = max(limit, params.factor * gvfa_residual(c.u, w, expected[:, :-1]))
            row = int(np.argmin(z))
            honest = c.u[row] / z[row]
            direction = rng.standard_normal(honest.shape).astype(np.float32)
            direction /= np.linalg.norm(direction)
            # Half of all challenges pass where the largest of `repetitions` |N(0, size)| stays below the tolerance.
            passed = 0.5 ** (1 / params.repetitions)
            size = limit / _quantile(passed)
            w = rng.standard_normal((honest.size, 2000 * params.repetitions), np.float32)
            changed = rounded(c.u[row] + size * direction, formats[0])
            residual = np.abs(changed @ w - tile.e[:, row] @ (local.v @ w)).reshape(2000, -1).max(axis=1)
            moved = float(np.linalg.norm(changed / z[row] - honest) / np.linalg.norm(honest))
            if moved > worst["output"] and float(np.mean(residual <= limit)) >= 0.3:
                worst = {
                    "output": moved, "z": float(z[row]), "change": size, "rate": float(np.mean(residual <= limit)),
                    "layer": head.layer,
                }  # fmt: skip
        out[f"shift {shift}"] = worst
    return out


def _quantile(p: float) -> float:
    """x with 2 Phi(x) - 1 = p."""
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < p else (low, middle)
    return low


def learn(target: Target) -> dict[str, Any]:
    """Learn a coefficient vector that is kept, from accept and reject alone, then forge at will.

    Two positions whose changes e^x, e^-x pass have the same coefficient. Each position is tried against one representative
    of every class that is known. This needs a verifier that goes on after a reject, which this one never does.
    """
    params = target.params
    keys = target.head.tokens
    some = np.sort(target.rng.choice(keys, min(LEARN_KEYS, keys), replace=False))
    kept = target.secrets()
    queries = 0
    first_pair = None

    def passes(i: int, j: int, size: float = 5.0) -> bool:
        nonlocal queries
        queries += 1
        e = target.e
        e[i] *= np.float32(math.exp(size))
        e[j] *= np.float32(math.exp(-size))
        return target.accepts(e, secrets=kept)

    classes: list[list[int]] = []
    for position in map(int, some):
        for members in classes:
            if passes(position, members[0]):
                members.append(position)
                first_pair = first_pair or queries
                break
        else:
            classes.append([position])
    truth = kept.a[0]
    right = sum(len({int(truth[m]) for m in members}) == 1 for members in classes)
    used = queries
    pairs = [(m[0], m[1]) for m in classes if len(m) > 1]
    forged = fresh = 0
    for n in range(FORGERIES):
        i, j = pairs[n % len(pairs)] if pairs else (int(some[0]), int(some[1]))
        forged += passes(i, j)
        e = target.e
        e[i] *= np.float32(math.exp(5.0))
        e[j] *= np.float32(math.exp(-5.0))
        fresh += target.accepts(e)
    return {
        "keys": len(some), "n_a": params.n_a, "queries": used, "queries_to_first_pair": first_pair,
        "classes_right": right, "classes": len(classes), "forgeries": FORGERIES, "accepted_reused": forged,
        "accepted_fresh": fresh, "survives_first_reject": 1 / params.n_a,
    }  # fmt: skip


def measure(model: FloatModel, text: str, note: Callable[[str], None]) -> dict[str, Any]:
    """All attacks per format; how often each is tried is fixed here."""
    ids = token_ids(model, text, 700)
    heads = capture(model, ids[200 : 200 + TOKENS])
    kv = model.config.num_kv_heads
    some = [heads[layer * kv + layer % kv] for layer in range(0, model.config.num_layers, EVERY)]
    formats: dict[str, Any] = {}
    for pair_of in FORMATS:
        name = pair_of[0] if pair_of[0] == pair_of[1] else f"{pair_of[0]}, E in {pair_of[1]}"
        note(f"{name}: calibration")
        config = FloatConfig("veriattn", format=pair_of[0], exp_format=pair_of[1])
        prover = FloatProver(model.source, hello_of(model, config))
        limits, hopeless = calibrated(model, config, calibration_prompts(ids, TOKENS), 4, prover)
        note(f"{name}: attention")
        targets = [Target(head, pair_of, limits, config.params) for head in some]
        targets = [t for t in targets if t.usable and t.rate(t.e, draws=20) > 0.8]
        singles, pairs = [one_weight(t) for t in targets], [pair(t) for t in targets]
        note(f"{name}: small rows, learning")
        result: dict[str, Any] = {
            "honest_claims_out_of_range": hopeless,
            "rows_attacked": len(targets), "rows_unusable": len(some) - len(targets),
            "one_weight": _summary(singles), "pair": _summary(pairs),
            "pair_rate_at_e5": float(np.mean([p["rate_at_e5"] for p in pairs])) if pairs else None,
            "pair_output_at_e5": float(np.median([p["output_at_e5"] for p in pairs])) if pairs else None,
            "small_row": small_row(some, pair_of, config.params),
            "learn": learn(targets[len(targets) // 2]) if targets else None,
        }  # fmt: skip
        note(f"{name}: steering tokens over {STEER_TOKENS} positions")
        result["steer"] = steering.measure(
            model, config, prover, limits, ids[600 : 600 + 16 + STEER_TOKENS], STEER_TOKENS
        )
        formats[name] = result
        note(json.dumps({name: result}))
    return {
        "model_digest": model.source.digest(), "params": {"n_a": CheckParams().n_a, "tau_a": CheckParams().tau_a,
        "tau_g": CheckParams().tau_g, "repetitions": CheckParams().repetitions, "factor": CheckParams().factor},
        "formats": formats,
    }  # fmt: skip


def _summary(rows: list[dict[str, float]]) -> dict[str, float] | None:
    if not rows:
        return None
    at = int(np.argmax([r["output"] for r in rows]))
    return {
        "median_change": float(np.median([r["change"] for r in rows])),
        "largest_change": float(max(r["change"] for r in rows)),
        "median_output": float(np.median([r["output"] for r in rows])),
        "largest_output": rows[at]["output"],
    }


def plot(data: dict[str, Any], figure: Any) -> None:
    """Sizes that pass, and the share of tokens that can be turned."""
    left, right = figure.subplots(1, 2)
    names = list(data["formats"])
    at = np.arange(len(names))
    for i, (key, label) in enumerate((("one_weight", "one weight"), ("pair", "a pair"))):
        values = [(data["formats"][n][key] or {}).get("median_change", math.nan) for n in names]
        left.bar(at - 0.2 + 0.4 * i, [max(v, 1e-6) for v in values], 0.4, label=label)
    left.set_yscale("log")
    left.set_ylabel("relative change that passes")
    left.legend(frameon=False)
    for i, (key, label) in enumerate((("head", "last claim alone"), ("all", "every layer"))):
        right.bar(at - 0.2 + 0.4 * i, [data["formats"][n]["steer"][key]["flipped"] for n in names], 0.4, label=label)
    right.set_ylabel("tokens turned unnoticed")
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.set_xticks(at, [n.replace(", ", "\n") for n in names], fontsize=7)
