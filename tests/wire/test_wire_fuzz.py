"""A short run of `tools/fuzz_wire.py` with a fixed seed, and proof that it can fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools" / "fuzz_wire.py"
SPEC = importlib.util.spec_from_file_location("fuzz_wire", PATH)
assert SPEC is not None and SPEC.loader is not None
fuzz_wire = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz_wire)


def test_fuzz(tmp_path: Path) -> None:
    assert fuzz_wire.fuzz(60.0, seed=1, corpus=tmp_path, inputs=600) == 600
    assert list(tmp_path.iterdir()) == []


def test_it_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fuzz_wire.wm.decode_free
    monkeypatch.setattr(
        fuzz_wire.wm, "decode_free", lambda raw, limits: honest(bytes(raw)[: len(raw) // 8 * 8], limits)
    )
    with pytest.raises(AssertionError):
        fuzz_wire.fuzz(60.0, seed=1, corpus=tmp_path, inputs=600)
    assert len(list(tmp_path.iterdir())) == 1
