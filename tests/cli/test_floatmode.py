"""`calibrate`, `generate --numerics float` and `reproduce` on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.convert.conftest import HfFiles, Tiny

from veriattn.cli.app import main
from veriattn.errors import EXIT_OK, EXIT_USAGE, ModelError

WIDE = ["--tolerance-factor", "32"]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VERIATTN_HOME", str(tmp_path / "home"))
    tiny = Tiny("llama")
    HfFiles(tiny.hf_config(), tiny.hf_tensors()).write(tmp_path / "model")
    return tmp_path / "model"


def last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def generate(checkpoint: Path, *more: str) -> int:
    return main(
        [
            "generate",
            "-m",
            str(checkpoint),
            "--numerics",
            "float",
            "--raw",
            "--max-tokens",
            "3",
            "--json",
            *more,
            "hello",
        ]
    )


def test_calibrate_then_generate_says_that_there_is_a_tolerance(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--prompt-tokens", "16", "--max-tokens", "4"]
    assert main(["calibrate", "-m", str(checkpoint), *size, *WIDE, "--json"]) == EXIT_OK
    calibrated = last_json(capsys)
    assert calibrated["guarantee"] == "tolerance" and calibrated["tolerances"]["exp"] > 0
    assert json.loads(Path(calibrated["path"]).read_text())["digest"] == calibrated["model_digest"]
    assert generate(checkpoint, "--strategy", "full-tee") == EXIT_OK
    trusted = last_json(capsys)
    assert trusted["guarantee"] == "trusted-compute" and trusted["prover"]["pid"] is None
    assert (
        generate(checkpoint, "--strategy", "veriattn", "--prover-kv-tokens", "0", "--offload-ratio", "1", *WIDE)
        == EXIT_OK
    )
    captured = capsys.readouterr()
    found = json.loads(captured.out.strip().splitlines()[-1])
    assert found["guarantee"] == "tolerance" and found["token_ids"] == trusted["token_ids"]
    assert found["kv"]["streamed_tokens"] > 0 and found["model"]["digest"] == calibrated["model_digest"]
    assert all(line.startswith("[TOLERANCE]") for line in captured.err.splitlines() if line)


def test_nothing_runs_without_tolerances(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, "--strategy", "veriattn") == ModelError.exit_code
    assert "calibrate" in last_json(capsys)["error"]["hint"]


@pytest.mark.parametrize(
    "more", [["--temperature", "0.5"], ["--kv-shield", "static"], ["--stop", "x"], ["--tiles", "auto"]]
)
def test_options_without_meaning_are_refused(checkpoint: Path, more: list[str]) -> None:
    assert generate(checkpoint, *more) == EXIT_USAGE


def test_exact_numerics_have_no_tolerances(checkpoint: Path) -> None:
    assert main(["generate", "-m", str(checkpoint), "--n-a", "4", "hello"]) == EXIT_USAGE


def test_reproduce_writes_what_it_measured(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "published", "--out", str(tmp_path / "out"), "--json"]) == EXIT_OK
    assert json.loads(Path(last_json(capsys)["file"]).read_text())["figures"]
    assert main(["reproduce", "table1", "--out", str(tmp_path / "out")]) == EXIT_USAGE
