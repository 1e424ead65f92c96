"""Shielded and plain runs side by side, for quick tests and for acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.convert.models import float_model, random_windows, text_of

from veriattn.convert.converter import convert
from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.native import kernels

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
#: Name, mode, layers that stay in the TEE.
SHIELDS = {"static": ("static", 0), "session": ("session", 0), "session+1": ("session", 1)}
#: Keys of a sequence that the prover may keep: none, a few, all.
LIMITS = (0, 3, None)
TOKENS = 5


def make(arch: str, path: Path) -> Path:
    """A random float model of an architecture, converted."""
    convert(float_model(arch), path, calibration_text=text_of(300), threads=1, kernels=kernels)
    return path


def prompts(arch: str) -> list[tuple[int, ...]]:
    """Five prompts of different lengths."""
    window = random_windows(float_model(arch), 5, 19)
    return [tuple(ids[: 3 + 4 * i]) for i, ids in enumerate(window)]


def answers(model: Path, ids: list[tuple[int, ...]], batch: int, **settings: Any) -> list[list[int]]:
    """Token ids of all prompts, so many at a time."""
    with Engine(model, EngineConfig(max_sequences=batch, **settings)) as engine:
        states = engine.generate([Request(p, max_tokens=TOKENS, ignore_eos=True) for p in ids])
        return [s.output_ids for s in states]


def shielded(strategy: str, shield: str, limit: int | None) -> dict[str, Any]:
    """Settings of an engine."""
    mode, own = SHIELDS[shield]
    settings: dict[str, Any] = {"strategy": strategy, "kv_shield": mode, "shield_first_layers": own}
    return settings if limit is None else {**settings, "prover_kv_tokens": limit, "offload_ratio": 1.0}
