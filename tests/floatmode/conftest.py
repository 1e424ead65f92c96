"""A tiny float checkpoint on disk, which both processes open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.convert.conftest import HfFiles, Tiny

from veriattn.convert.sources import open_source
from veriattn.floatmode.engine import FloatModel


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped keys, biases."""
    base = tmp_path_factory.mktemp("float")
    for parent in (base, base.parent, base.parent.parent):
        parent.chmod(0o755)  # a prover with its own user must be able to read it
    tiny = Tiny("qwen2", kv_heads=2)
    HfFiles(tiny.hf_config(), tiny.hf_tensors()).write(base / "model")
    return base / "model"


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> FloatModel:
    return FloatModel(open_source(checkpoint))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [[int(t) for t in rng.integers(3, 260, n)] for n in (4, 37)]
