"""`pull`, `convert`, `eval` as processes: over a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Cli
from tests.convert.conftest import make_gguf  # noqa: F401  (a fixture)

from veriattn.convert.pull import PUBLISHED


@pytest.fixture
def checkpoint(tmp_path: Path, make_gguf: Callable[..., Any]) -> Path:  # noqa: F811
    path: Path = make_gguf().write(tmp_path / "m.gguf")
    return path


def test_convert_then_eval_then_generate(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    converted = cli("convert", checkpoint, "-o", out, "--json")
    assert converted.code == 0, converted.err
    assert converted.json["path"] == str(out)
    text = tmp_path / "text"
    text.write_text("hello world, hello hello. " * 20, encoding="utf-8")
    done = cli("eval", "-m", out, "--text", text, "--window", 64, "--max-tokens", 100, "--json")
    assert done.code == 0, done.err
    got = done.json
    assert got["tokens"] == 100
    assert got["model"]["digest"] == converted.json["model_digest"]
    assert got["ppl"] > 1 and got["ppl_reference"] > 1 and got["kl"] > 0 and 0 < got["top1"] <= 1
    assert got["ppl_ratio"] == got["ppl"] / got["ppl_reference"]
    answer = cli(
        "generate", "-m", out, "--raw", "hello", "--max-tokens", 2, "--digest", got["model"]["digest"], "--json"
    )
    assert answer.code == 0 and answer.json["verified"] is True


def test_eval_wants_the_checkpoint_of_the_model(
    cli: Cli,
    checkpoint: Path,
    tmp_path: Path,
    make_gguf: Callable[..., Any],  # noqa: F811
) -> None:
    out = tmp_path / "model"
    assert cli("convert", checkpoint, "-o", out).code == 0
    moved = checkpoint.rename(tmp_path / "moved.gguf")
    base = ("eval", "-m", out, "--text", __file__, "--window", 32, "--max-tokens", 40, "--json")
    done = cli(*base)
    assert done.code == 5 and "--source" in done.json["error"]["hint"]
    other = make_gguf(seed=1).write(tmp_path / "other.gguf")
    assert "SHA-256" in cli(*base, "--source", other).json["error"]["message"]
    assert cli(*base, "--source", moved).code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--window", 5000), "context holds"), (("--window", 1), "--window"), (("--max-tokens", 1), "--max-tokens")],
)
def test_eval_usage(cli: Cli, tiny: Path, arguments: tuple[object, ...], words: str) -> None:
    done = cli("eval", "-m", tiny, "--text", __file__, "--json", *arguments)
    assert done.code == 2 and words in done.json["error"]["message"]


def test_the_recorded_demo_belongs_to_the_published_model() -> None:
    root = Path(__file__).resolve().parents[2]
    recorded = json.loads((root / "demo" / "expected.json").read_text(encoding="utf-8"))
    assert recorded["model_digest"] == PUBLISHED["smollm2"].model_digest
    assert len(recorded["token_ids"]) == 48
