"""Table 1: what a check costs beside recomputing, and what it detects, for prefill and decode, attention weights and E V."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from veriattn.convert.checkpoint import F32
from veriattn.floatmode.checks import coefficients, generator, gvfa_residual, lp_worst
from veriattn.floatmode.engine import FloatModel
from veriattn.floatmode.params import CheckParams, Format
from veriattn.floatmode.reproduce.heads import Claims, Head, capture, claims, synthetic
from veriattn.floatmode.reproduce.prompts import token_ids
from veriattn.floatmode.trusted import AttentionSecrets, TileClaim, project, with_ones

#: As printed in the paper (Qwen3-14B, TEE with 16 vCPU): seconds, check and recompute.
PUBLISHED = {
    "prefill exp": (0.12, 2.34),
    "prefill EV": (0.036, 0.41),
    "decode exp": (0.45e-3, 7.34e-3),
    "decode EV": (0.27e-3, 3.73e-3),
}
CELLS = tuple(PUBLISHED)
FORMATS: tuple[tuple[Format, Format], ...] = (
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
)
#: Qwen3-14B's attention: 40 heads on 8 KV heads of 128.
KV_HEADS, GROUP, DIM = 8, 5, 128
PREFILL, DECODE = 2048, 8192
TRIAL_TOKENS, TILE = 256, 16
CHECK_TILE = 64
Rng = np.random.Generator


def best(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def recompute_weights(q: F32, k: F32, group: int, tile: int) -> list[F32]:
    """E of the last rows of a head, tile by tile: one product, mask on the diagonal block alone, exp in place."""
    scaled, keys, tokens = q * np.float32(k.shape[1] ** -0.5), k.shape[0], q.shape[0] // group
    first, out = keys - tokens, []
    for lo in range(first, keys, tile):
        hi = min(lo + tile, keys)
        s = scaled[(lo - first) * group : (hi - first) * group] @ k[:hi].T
        if hi - lo > 1:
            hidden = np.repeat(np.triu(np.ones((hi - lo, hi - lo), bool), 1), group, axis=0)
            s[:, lo:][hidden] = -np.inf
        s -= s.max(axis=1, keepdims=True)
        np.exp(s, out=s)
        out.append(np.asarray(s, np.float32))
    return out


def _prefill() -> dict[str, dict[str, float]]:
    head, params, rng = synthetic(PREFILL, DIM, GROUP), CheckParams(), generator()
    times = {t: best(lambda t=t: recompute_weights(head.q, head.k, GROUP, t), 3) for t in (16, 32, 64, 128)}  # type: ignore[misc]
    fastest = min(times, key=lambda t: times[t])
    weights = recompute_weights(head.q, head.k, GROUP, fastest)
    outputs = best(lambda: [e @ head.v[: e.shape[1]] for e in weights], 3)
    made = [claims(head, lo, lo + CHECK_TILE, "float32", "float32") for lo in range(0, PREFILL, CHECK_TILE)]
    u = np.concatenate([c.u for c in made])
    secrets = AttentionSecrets.draw(rng, head.k, head.v, 0, params)

    def check_weights() -> None:
        a = AttentionSecrets.draw(rng, head.k, head.v, 0, params)
        for c in made:
            for r in a.residuals(c.tile, DIM**-0.5):
                lp_worst(r, rng, params.tau_g)

    def check_outputs() -> None:
        projected = with_ones(project(head.v, secrets.w))
        expected = np.concatenate([c.tile.e.T @ projected[: c.tile.e.shape[0]] for c in made])
        gvfa_residual(u, secrets.w, expected[:, :-1])

    return {
        "prefill exp": {"check": KV_HEADS * best(check_weights), "recompute": KV_HEADS * times[fastest]},
        "prefill EV": {"check": KV_HEADS * best(check_outputs), "recompute": KV_HEADS * outputs},
    }


def _decode() -> dict[str, dict[str, float]]:
    params, rng, last = CheckParams(), generator(), DECODE - 1
    heads = [synthetic(DECODE, DIM, GROUP, seed) for seed in range(KV_HEADS)]
    made = [claims(head, last, DECODE, "float32", "float32") for head in heads]
    queries = [head.q[last * GROUP :] for head in heads]
    secrets = [AttentionSecrets.draw(rng, head.k, head.v, last, params) for head in heads]
    weights = [recompute_weights(q, head.k, GROUP, 1)[0] for q, head in zip(queries, heads, strict=True)]

    def recompute() -> None:
        for q, head in zip(queries, heads, strict=True):
            recompute_weights(q, head.k, GROUP, 1)

    def check_weights(fresh: bool) -> None:
        for s, c, head in zip(secrets, made, heads, strict=True):
            if fresh:
                used = AttentionSecrets.of(coefficients(rng, DECODE, params), s.w, head.k, s.projected, last)
            else:  # running sums: the new key is added, O(d)
                used = s
                _ = s.prefix[:, 0] + s.a[:, last:].astype(np.float64) * head.k[last]
            for r in used.residuals(c.tile, DIM**-0.5):
                lp_worst(r, rng, params.tau_g)

    def check_outputs(fresh: bool) -> None:
        for s, c, head in zip(secrets, made, heads, strict=True):
            if fresh:
                projected = with_ones(project(head.v, s.w))
            else:
                projected = s.projected
                _ = head.v[last] @ s.w
            gvfa_residual(c.u, s.w, (c.tile.e.T @ projected)[:, :-1])

    out = {
        "decode exp": {"check": best(lambda: check_weights(False)), "recompute": best(recompute)},
        "decode EV": {
            "check": best(lambda: check_outputs(False)),
            "recompute": best(lambda: [e @ head.v for e, head in zip(weights, heads, strict=True)]),
        },
    }
    out["decode exp"]["check_fresh"] = best(lambda: check_weights(True))
    out["decode EV"]["check_fresh"] = best(lambda: check_outputs(True))
    return out


def times() -> dict[str, dict[str, float]]:
    """Seconds of a layer for all four cells, on this machine as it is configured."""
    out = {**_prefill(), **_decode()}
    for t in out.values():
        t["ratio"] = t["check"] / t["recompute"]
    return out


def residuals(c: Claims, head: Head, lo: int, hi: int, params: CheckParams, rng: Rng) -> dict[str, float]:
    """Residuals of both checks on claims for tokens [lo, hi), with fresh secrets."""
    secrets = AttentionSecrets.draw(rng, head.k[:hi], head.v[:hi], lo, params)
    worst = max(lp_worst(r, rng, params.tau_g) for r in secrets.residuals(c.tile, head.k.shape[1] ** -0.5))
    return {"exp": worst, "EV": gvfa_residual(c.u, secrets.w, secrets.outputs(c.tile)[:, :-1])}


def faulty(c: Claims, where: str, rng: Rng) -> Claims:
    """The paper's fault, x' = x +- 0.01 max(1, |x|), in one element of E that a row sees, or of U."""
    tile = TileClaim(np.array(c.tile.e), c.tile.shift, c.tile.q, c.tile.visible)
    x, u = tile.e, np.array(c.u)
    if where == "exp":
        row = int(rng.integers(x.shape[1]))
        at = int(rng.integers(tile.visible[row])), row
    else:
        x, at = u, (int(rng.integers(u.shape[0])), int(rng.integers(u.shape[1])))
    x[at] += np.float32(rng.choice((-0.01, 0.01)) * max(1.0, abs(float(x[at]))))
    return Claims(tile, u)


def trials(heads: list[Head], formats: tuple[Format, Format], count: int) -> dict[str, dict[str, Any]]:
    """Detections among faulty claims and rejects among clean ones, per cell.

    One tolerance per check, as `calibrate` has it: the factor times the largest residual of as many clean runs, here of one
    set of claims. A clean claim serves both checks, and its faulty twins have secrets of their own.
    """
    rng, params = generator(), CheckParams()
    local = [head.in_format(formats[0]) for head in heads]
    tokens = local[0].tokens
    out: dict[str, dict[str, Any]] = {}
    for stage, rows in (("prefill", TILE), ("decode", 1)):
        limits: dict[str, float] = {}
        hopeless = 0
        for head in local:
            for lo in range(0, tokens, TILE) if stage == "prefill" else range(tokens // 2, tokens, TILE):
                c = claims(head, lo, lo + rows, *formats)
                for _ in range(params.calibration_runs):
                    for name, r in residuals(c, head, lo, lo + rows, params, rng).items():
                        if np.isfinite(r):
                            limits[name] = max(limits.get(name, 0.0), params.factor * r)
                        else:
                            hopeless += 1
        caught, rejected = {"exp": 0, "EV": 0}, {"exp": 0, "EV": 0}
        for _ in range(count):
            head = local[int(rng.integers(len(local)))]
            lo = (
                TILE * int(rng.integers(tokens // TILE))
                if stage == "prefill"
                else int(rng.integers(tokens // 2, tokens))
            )
            c = claims(head, lo, lo + rows, *formats)
            clean = residuals(c, head, lo, lo + rows, params, rng)
            for name in ("exp", "EV"):
                limit = limits.get(name, 0.0)
                rejected[name] += not clean[name] <= limit
                found = residuals(faulty(c, name, rng), head, lo, lo + rows, params, rng)
                caught[name] += not found[name] <= limit
        for name in ("exp", "EV"):
            out[f"{stage} {name}"] = {
                "faulty": count, "detected": caught[name], "clean": count, "false_rejects": rejected[name],
                "tolerance": limits.get(name), "unusable_in_calibration": hopeless if name == "exp" else 0,
            }  # fmt: skip
    return out


def measure(model: FloatModel, text: str, count: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Times at Qwen3-14B's attention, one layer; trials on activations of the model, every other layer."""
    note("times of prefill and decode")
    seconds = times()
    note(json.dumps(seconds))
    heads = capture(model, token_ids(model, text, TRIAL_TOKENS)[:TRIAL_TOKENS])
    kv = model.config.num_kv_heads
    some = [heads[layer * kv + layer % kv] for layer in range(0, model.config.num_layers, 2)]
    detection = {}
    for formats in FORMATS:
        name = formats[0] if formats[0] == formats[1] else f"{formats[0]}, E in {formats[1]}"
        note(f"trials in {name}")
        detection[name] = trials(some, formats, count)
        note(json.dumps({name: detection[name]}))
    return {
        "shape": {
            "kv_heads": KV_HEADS,
            "group": GROUP,
            "head_dim": DIM,
            "prefill": PREFILL,
            "decode": DECODE,
            "layers": 1,
        },
        "seconds": seconds,
        "published_seconds": {k: {"check": c, "recompute": r, "ratio": c / r} for k, (c, r) in PUBLISHED.items()},
        "model_digest": model.source.digest(),
        "detection": detection,
    }


def plot(data: dict[str, Any], figure: Any) -> None:
    """Check over recompute, here and published; detections and false rejects."""
    left, right = figure.subplots(1, 2)
    at = np.arange(len(CELLS))
    left.bar(at - 0.2, [data["seconds"][c]["ratio"] for c in CELLS], 0.4, label="here", color="#3b6fb6")
    left.bar(at + 0.2, [data["published_seconds"][c]["ratio"] for c in CELLS], 0.4, label="paper", color="#b0b8c4")
    left.set_xticks(at, [c.replace(" ", "\n") for c in CELLS])
    left.set_ylabel("check / recompute")
    left.legend(frameon=False)
    names = list(data["detection"])
    for i, name in enumerate(names):
        cells = data["detection"][name]
        values = [100 * cells[c]["detected"] / cells[c]["faulty"] for c in CELLS]
        right.plot(at, values, "o-", label=f"{name}: detected", color=f"C{i}")
        rejects = [100 * cells[c]["false_rejects"] / cells[c]["clean"] for c in CELLS]
        right.plot(at, rejects, "x:", color=f"C{i}")
    right.set_xticks(at, [c.replace(" ", "\n") for c in CELLS])
    right.set_ylabel("% (x: clean claims rejected)")
    right.legend(frameon=False, fontsize=7)
