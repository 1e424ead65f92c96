"""Random faults are all met by their error; a campaign against a verifier that checks nothing fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veriattn.errors import InternalError, UsageError
from veriattn.redteam.campaign import run
from veriattn.verifier import checks

RANDOM = ("bit/*", "element/*")


def assert_all_met(result: dict[str, Any], trials: int) -> None:
    assert result["ok"], result["failure_examples"]
    assert result["failures"] == 0 and result["failure_examples"] == []
    assert result["trials"] == result["detections"] == trials
    assert result["honest"]["false_rejects"] == 0


def test_random_faults_of_every_kind_are_detected(model_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = run(model_path, 280, 11, RANDOM, lambda done, total: calls.append((done, total)))
    assert_all_met(result, 280)
    assert calls[-1] == (280, 280) and len(calls) == 280
    assert set(result["attacks"]) == {
        f"{fault}/{kind}"
        for fault in ("bit", "element")
        for kind in ("qkv", "scores", "attention", "o", "gate_up", "down", "lm_head")
    }
    for name, tally in result["attacks"].items():
        code = "attention_mismatch" if name.endswith(("scores", "attention")) else "freivalds_mismatch"
        assert tally["codes"] == {code: 20}, name
    assert result["honest"]["checks"] > 10_000
    assert result["honest"]["runs"] >= 280
    for split, names in (("strategies", {"run-ahead", "veriattn", "tsdp"}), ("links", {"memfd", "tcp"})):
        assert set(result[split]) == names
        assert all(t["trials"] == t["detections"] > 10 for t in result[split].values())
        assert sum(t["trials"] for t in result[split].values()) == 280


def test_named_attacks_by_pattern(model_path: Path) -> None:
    result = run(model_path, 12, 3, ["header_*"])
    assert result["ok"] and result["trials"] == 12
    assert all(name.startswith("header_") for name in result["attacks"])


def test_a_verifier_that_checks_nothing_fails_the_campaign(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(y: Any, *_: Any) -> Any:
        return np.ones(len(y), np.uint8)

    monkeypatch.setattr(checks, "linear_check", accept_all)
    result = run(model_path, 8, 5, ["bit/lm_head"])
    assert not result["ok"]
    assert result["failures"] == 8
    assert "released wrong logits" in result["failure_examples"][0]


def test_a_verifier_that_rejects_honest_work_fails_the_campaign(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject_all(y: Any, *_: Any) -> Any:
        return np.zeros(len(y), np.uint8)

    monkeypatch.setattr(checks, "linear_check", reject_all)
    with pytest.raises(InternalError, match="freivalds_mismatch"):
        run(model_path, 8, 5, ["bit/lm_head"])


def test_unknown_attack(model_path: Path) -> None:
    with pytest.raises(UsageError, match="no attack"):
        run(model_path, 8, 5, ["nothing like this"])
    with pytest.raises(UsageError, match="at least one"):
        run(model_path, 0, 5)
