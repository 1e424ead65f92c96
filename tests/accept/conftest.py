"""What the acceptance measurements share: SmolLM2, pulled once, and a line per figure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veriattn.convert.pull import pull
from veriattn.native import kernels


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return pull("smollm2", kernels=kernels).path


@pytest.fixture(scope="session")
def eval_text() -> Path:
    """The text for quality: $EVAL_TEXT (make accept EVAL_TEXT=FILE), WikiText-2's validation split by default."""
    path = Path(os.environ.get("EVAL_TEXT", "../shared/data/wikitext-2/valid.txt"))
    if not path.is_file():
        pytest.fail(f"there is no text at {path}: get WikiText-2's valid.txt and run make accept EVAL_TEXT=FILE")
    return path
