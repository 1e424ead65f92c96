"""Every implementation of the canonical operations on this machine, one test each."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from veriattn.native import kernels as native_kernels
from veriattn.spec import reference

# The extension is part of the package: where it does not import, these tests fail, they do not shrink.
IMPLEMENTATIONS = ["numpy", *(f"native-{isa}" for isa in native_kernels.available_isas())]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """`spec.reference`, then the native kernels once per instruction set."""
    if request.param == "numpy":
        yield reference
        return
    before = native_kernels.active_isa()
    native_kernels.set_isa(request.param.removeprefix("native-"))
    yield native_kernels
    native_kernels.set_isa(before)
