"""Table 2: do checked runs choose the tokens of the float reference, and how far apart are the logits?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from veriattn.convert.float_reference import FloatKVCache, FloatReference
from veriattn.floatmode.calibrate import calibration_prompts
from veriattn.floatmode.engine import FloatConfig, FloatModel, codec_of
from veriattn.floatmode.params import Format, kind_of
from veriattn.floatmode.prover import FloatProver
from veriattn.floatmode.reproduce.local_link import calibrated, hello_of, open_local
from veriattn.floatmode.reproduce.prompts import token_ids

#: As printed: top-1 agreement over 100 greedy tokens, largest logit difference.
PUBLISHED = {"top1": 1.00, "largest_difference": 3.1e-3}
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
)
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16")
TOKENS = 100


def measure(model: FloatModel, text: str, note: Callable[[str], None]) -> dict[str, Any]:
    """Both sides are fed the reference's greedy tokens, so that one early difference does not hide the later ones."""
    codec, reference = codec_of(model.source), FloatReference(model.source)
    prompts = calibration_prompts(token_ids(model, text, 256), 96)
    wanted = []
    for prompt in PROMPTS:
        cache, ids = FloatKVCache(model.config), codec.encode(prompt)
        fed, logits = [ids], []
        for _ in range(TOKENS):
            logits.append(np.array(reference.logits(fed[-1], cache)[-1]))
            fed.append([int(np.argmax(logits[-1]))])
        wanted.append((fed[:-1], logits))
    formats = {}
    for fmt in FORMATS:
        note(f"{fmt}: calibration, then {len(PROMPTS)} x {TOKENS} tokens")
        config = FloatConfig("veriattn", format=fmt)
        prover = FloatProver(model.source, hello_of(model, config))
        limits, _ = calibrated(model, config, prompts, 8, prover)
        checks = rejected = 0
        same, differences = 0, []

        def judge(key: str, residual: float, limits: dict[str, float] = limits) -> bool:
            nonlocal checks, rejected
            checks += 1
            rejected += not residual <= limits[kind_of(key)]
            return True

        ops, _ = open_local(model, config, judge, prover)
        for fed, logits in wanted:
            ops.reset()
            for ids, expected in zip(fed, logits, strict=True):
                got = model.forward(ops, ids)
                same += int(np.argmax(got)) == int(np.argmax(expected))
                differences.append(float(np.max(np.abs(got - expected))))
        formats[fmt] = {
            "tokens": len(differences), "top1": same / len(differences), "largest_difference": max(differences),
            "median_difference": float(np.median(differences)), "checks": checks, "false_rejects": rejected,
        }  # fmt: skip
        note(json.dumps({fmt: formats[fmt]}))
    return {"model_digest": model.source.digest(), "formats": formats, "published": PUBLISHED}


def plot(data: dict[str, Any], figure: Any) -> None:
    """Largest and median logit differences per format, and what was published."""
    axes = figure.subplots()
    names = list(data["formats"])
    at = np.arange(len(names))
    axes.bar(at - 0.2, [data["formats"][n]["largest_difference"] for n in names], 0.4, label="largest", color="#3b6fb6")
    axes.bar(at + 0.2, [data["formats"][n]["median_difference"] for n in names], 0.4, label="median", color="#9cc3e6")
    axes.axhline(data["published"]["largest_difference"], ls=":", color="black", label="paper, largest")
    axes.set_yscale("log")
    axes.set_xticks(at, [f"{n}\ntop-1 {data['formats'][n]['top1']:.3f}" for n in names])
    axes.set_ylabel("logit difference")
    axes.legend(frameon=False)
