"""SmolLM2-135M from its published checkpoint: the demo as people run it, and the same tokens without a prover."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def pulled() -> None:
    """In the real home, so that it is fetched and converted once. Skips only where pip reaches no index."""
    done = run("-m", "veriattn", "pull", "smollm2", "--json")
    if "pip could not fetch" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-2])
    assert done.returncode == 0, done.stderr


def test_demo() -> None:
    done = run(str(Path("tools") / "check_demo.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "token ids as recorded" in done.stdout and "FAIL" not in done.stdout


@pytest.mark.parametrize("strategy", ["full-tee", "dangerous-unverified"])
def test_other_strategies_agree(strategy: str) -> None:
    expected = json.loads((ROOT / "demo" / "expected.json").read_text(encoding="utf-8"))
    command = ("-m", "veriattn", "generate", "-m", "smollm2", "--max-tokens", "48", "--strategy", strategy, "--json")
    done = run(*command, expected["prompt"])
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["token_ids"] == expected["token_ids"]
    assert answer["text"] == expected["text"]
