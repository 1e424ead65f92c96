"""Acceptance of the verifier against lying provers: 20,000 random faults on a tiny model, 500 on SmolLM2. `make accept`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import make_model

from veriattn.native import get_threads, set_threads
from veriattn.redteam.campaign import run

pytestmark = pytest.mark.accept

FAULTS = ("bit/*", "element/*")


def campaign(path: Path, trials: int, attacks: tuple[str, ...] | None = FAULTS) -> dict[str, Any]:
    started = time.monotonic()
    result = run(path, trials, 2026, attacks)
    honest = result["honest"]
    print(
        f"\n{result['trials']} trials, {result['detections']} detected, {result['failures']} failures; "
        f"{honest['checks']} checks of {honest['runs']} honest runs, {honest['false_rejects']} rejected; "
        + "; ".join(f"{n} {t['detections']}" for where in ("strategies", "links") for n, t in result[where].items())
        + f"; {time.monotonic() - started:.0f} s"
    )
    assert result["ok"], result["failure_examples"]
    assert honest["false_rejects"] == 0
    return result


def test_twenty_thousand_faults_on_a_tiny_model(tmp_path: Path) -> None:
    make_model(tmp_path / "tiny", num_heads=6, num_kv_heads=2, intermediate_size=72)
    before = get_threads()
    set_threads(1)
    try:
        result = campaign(tmp_path / "tiny", 20_000)
    finally:
        set_threads(before)
    assert result["trials"] == result["detections"] == 20_000
    assert result["honest"]["runs"] >= 20_000
    assert set(result["links"]) == {"memfd", "tcp"}
    assert set(result["strategies"]) == {"run-ahead", "veriattn", "tsdp"}


def test_every_named_attack_on_another_shape(tmp_path: Path) -> None:
    """Other sizes than the catalogue's own tests: three layers, one KV head, biases, norms and centres."""
    make_model(tmp_path / "odd", num_layers=3, num_kv_heads=1, qkv_bias=True, qk_norm=True, k_center=True)
    campaign(tmp_path / "odd", 400, None)


def test_five_hundred_faults_on_smollm2(smollm2: Path) -> None:
    result = campaign(smollm2, 500)
    assert result["trials"] == result["detections"] == 500
