"""Bars of whole runs: complete lines, and a memory that agrees with what a small model of the same sizes takes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import make_model

from veriattn.bench.bars import verifier_memory, whole_runs


def test_memory_grows_by_the_same_with_every_layer() -> None:
    two, three = verifier_memory(2, 512), verifier_memory(3, 512)
    assert verifier_memory(2, 512) == two and three["name"] == "verifier_memory.8b.0k"
    assert 0 < three["value"] < two["value"], "embeddings weigh less the more layers there are"
    assert verifier_memory()["met"]


def test_lines_of_whole_runs_are_complete(tmp_path: Path) -> None:
    make_model(tmp_path / "model", vocab_size=30_000, max_positions=2048, num_layers=1)
    results = whole_runs(tmp_path / "model", rounds=1)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert len({r["name"] for r in results}) == len(results) == 7
    assert all(r["value"] > 0 and (r["met"] is None) == (r["bar"] is None) for r in results)
