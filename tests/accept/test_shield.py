"""Acceptance of the KV shield: the same tokens everywhere, memory that is scrambled, leaks, cost. `make accept`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.shield import measure, table
from tests.shield.equality import ARCHITECTURES, LIMITS, SHIELDS, answers, make, prompts, shielded

from veriattn.native import get_threads, kernels, set_threads
from veriattn.redteam.kv_leak import leak_of, run
from veriattn.redteam.public_model import PublicModel
from veriattn.verifier.model import VerifierModel

pytestmark = pytest.mark.accept

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_tokens(arch: str, tmp_path: Path) -> None:
    """5 prompts, one and four at a time, both strategies, every shield, with and without keys beyond the prover."""
    tmp_path.chmod(0o755)
    model, ids = make(arch, tmp_path / "model"), prompts(arch)
    plain = answers(model, ids, 4)
    for strategy, shield, limit, batch in itertools.product(("veriattn", "tsdp"), SHIELDS, LIMITS, (1, 4)):
        assert answers(model, ids, batch, **shielded(strategy, shield, limit)) == plain, (
            strategy,
            shield,
            limit,
            batch,
        )
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    expected = PublicModel(model, kernels).cached_values(ids[4], 0)
    for mode in ("off", "static", "session"):
        leak, _ = leak_of(model, ids[4], mode, 0, out)
        assert (leak.cache["0.v"][: len(ids[4])] != expected).any() == (mode != "off")


def generate(model: Path, *arguments: str) -> tuple[int, dict[str, object]]:
    command = [
        sys.executable,
        "-m",
        "veriattn",
        "generate",
        "-m",
        str(model),
        "Why is the sky blue?",
        "--json",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_the_command_says_which_shield(smollm2: Path) -> None:
    _, plain = generate(smollm2, "--max-tokens", "12")
    assert plain["kv_shield"] == "off"
    for mode, extra in (("static", ()), ("session", ("--shield-first-layers", "2"))):
        code, result = generate(smollm2, "--max-tokens", "12", "--strategy", "veriattn", "--kv-shield", mode, *extra)
        assert (code, result["kv_shield"], result["verified"]) == (0, mode, True)
        assert result["token_ids"] == plain["token_ids"]


def test_leaks(smollm2: Path, eval_text: Path) -> None:
    """The bars on two prompts; the tables in docs/kv-shield.md are of 20 (`veriattn redteam --kv-leak`)."""
    result = run(smollm2, eval_text.read_text(encoding="utf-8")[:20_000], 2)
    cases = {name: case["cache"]["value_dictionary"] for name, case in result["cases"].items()}
    print("\n" + json.dumps(result["cases"]) + json.dumps(result["after_end"]))
    assert result["same_tokens"] and all(case["shield_as_set"] for case in result["cases"].values())
    assert cases["off"]["rate"] >= 0.95
    assert cases["static"]["recovered"] == cases["session"]["recovered"] == 0
    assert result["after_end"]["overwritten"]["found"] == 0 < result["after_end"]["pages_only"]["found"]


def test_overhead(smollm2: Path) -> None:
    before = get_threads()
    set_threads(1)  # verifier and prover have a core each
    try:
        costs = measure(VerifierModel(smollm2))
    finally:
        set_threads(before)
    print("\n" + table(costs))
    assert costs["static"].ratio <= 1.03
