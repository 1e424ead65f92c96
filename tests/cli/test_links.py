"""Options of `generate` that are about the link: address, emulation, trace, tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.conftest import Cli, Outcome


def generate(cli: Cli, model: Path, *options: str) -> Outcome:
    prompt = "an example of a prompt that has some rows"
    return cli("generate", "-m", model, "--raw", prompt, "--max-tokens", 4, "--threads", 1, "--json", *options)


@pytest.fixture
def expected(cli: Cli, tiny_model: Path) -> object:
    return generate(cli, tiny_model, "--strategy", "full-tee").json["token_ids"]


def test_remote_prover(cli: Cli, tiny_model: Path, listening_prover: str, expected: object) -> None:
    data = generate(cli, tiny_model, "--prover-address", listening_prover).json
    assert data["token_ids"] == expected and data["verified"] is True
    assert data["prover"] == {"pid": None, "device": "cpu"}


@pytest.mark.parametrize("tiles", ["auto", "off", "2,3"])
def test_emulated_and_traced(cli: Cli, tiles: str, tiny_model: Path, tmp_path: Path, expected: object) -> None:
    trace = tmp_path / "trace.json"
    options = ("--strategy", "veriattn", "--tiles", tiles, "--emulate-link", "1,20", "--trace", str(trace))
    result = generate(cli, tiny_model, *options)
    data = result.json
    assert data["token_ids"] == expected
    assert data["emulated_link"] == "1 GB/s, 20 us (emulated)"
    assert set(data["trace"]) == {"steps", "wall_s", "verifier", "link", "prover"}
    for line in result.err.split("\n"):
        if "tokens" in line or "trace in" in line:
            assert "emulated" in line
    assert "emulated link of 1 GB/s" in trace.read_text()


@pytest.mark.parametrize(
    "options",
    [("--tiles", "x"), ("--emulate-link", "0"), ("--prover-address", "ftp://x"), ("--prover-address", "tcp://x")],
)
def test_bad_values(cli: Cli, options: tuple[str, str], tiny_model: Path) -> None:
    assert generate(cli, tiny_model, *options).code == 2


def test_nobody_listens(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    assert generate(cli, tiny_model, "--prover-address", f"unix://{tmp_path}/none").code == 4
