"""Runs a test once per instruction set of this machine, and gives the old one back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from veriattn import native


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.active_isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
