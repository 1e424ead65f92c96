"""Two tiny models of the same shape, a warm source of lying provers, and the script that every trial runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import make_model

from veriattn.native import get_threads, set_threads
from veriattn.redteam.launcher import LiarPool
from veriattn.redteam.trial import Script
from veriattn.verifier.model import VerifierModel

#: Claims that follow each other differ in size, so that each message attack has one right error.
SHAPE: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 72}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more."""
    before = get_threads()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(path, **SHAPE)
    return path


@pytest.fixture(scope="session")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "other"
    make_model(path, seed=1, **SHAPE)
    return path


@pytest.fixture(scope="session")
def model(model_path: Path) -> VerifierModel:
    return VerifierModel(model_path)


@pytest.fixture(scope="session")
def pool(model: VerifierModel) -> Iterator[LiarPool]:
    with LiarPool(model) as pool:
        yield pool


@pytest.fixture(scope="session")
def script(model: VerifierModel) -> Script:
    return Script.make(model, 1)
