"""Runs a test once per instruction set of this machine, and gives the old one back.

VERIATTN_TEST_NATIVE_DIR names the folder of another build of the extension to test (tools/build_native.py --test).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NAME = "veriattn.native._native"

if folder := os.environ.get("VERIATTN_TEST_NATIVE_DIR"):
    (path,) = Path(folder).glob("_native*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None and NAME not in sys.modules
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])

from veriattn import native  # noqa: E402


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.active_isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
