"""The kernel benchmark returns complete, finite lines and gives the thread count back; never how fast."""

from __future__ import annotations

import json

from veriattn.bench.kernels import run
from veriattn.native import kernels


def test_lines_are_complete() -> None:
    threads = kernels.get_threads()
    results = run(0.0)
    assert kernels.get_threads() == threads
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert len({r["name"] for r in results}) == len(results) == 19
    for r in results:
        assert set(r) == {"name", "value", "unit", "bar", "met", "roofline", "fraction"}
        assert r["value"] > 0 or r["name"] == "peak.int8_products"
        assert r["met"] in ((None,) if kernels.active_isa() != "amx" or r["bar"] is None else (True, False))
