"""Floating-point runners of the benchmarks: a random checkpoint of a shape, and bytes that shapes foretell exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from veriattn.bench.campaign import Plan, run
from veriattn.bench.runner import Setup, token_ids
from veriattn.bench.shapes import SHAPES
from veriattn.errors import UsageError
from veriattn.floatmode.bench import FloatRunner, write_random_checkpoint
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.wire.emulate import Throttle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bench")
    for parent in (base, base.parent, base.parent.parent):
        parent.chmod(0o755)
    write_random_checkpoint(base / "model", SHAPES["tiny"])
    return base / "model"


@pytest.mark.parametrize(
    ("strategy", "capacity", "ratio"),
    [("veriattn", None, None), ("tsdp", None, None), ("veriattn", 20, 0.5), ("veriattn", 0, 0.0), ("tsdp", 20, 1.0)],
)
def test_bytes_are_those_of_the_shapes(
    checkpoint: Path, strategy: str, capacity: int | None, ratio: float | None
) -> None:
    runner = FloatRunner(strategy, checkpoint, Setup(prover_kv_tokens=capacity, offload_ratio=ratio))  # type: ignore[arg-type]
    try:
        runner.step(Batch((BatchEntry(0, 0, token_ids(37, 320), "last"),)))
        for n in range(37, 40):
            runner.step(Batch((BatchEntry(0, n, (7,), "last"),)))
        runner.free(0)
        runner.fill(0, 50)
        counters = runner.counters()
        assert counters.moved == counters.paper
        assert counters.moved.from_prover > 0
        assert runner.residuals and runner.peaks()[1]
    finally:
        runner.close()


def test_float_and_exact_stand_in_one_table() -> None:
    plan = Plan(
        "prefill", "tiny", ("veriattn", "full-tee"), (16,), (1,), None, "cpu", 1, 1, Setup(prefill_chunk=64), steps=1,
        rates_seconds=0.0, numerics="both",
    )  # fmt: skip
    points, _ = run(plan, lambda _line: None)
    assert [p.strategy for p in points] == ["veriattn", "full-tee", "full-tee-float", "veriattn-float"]
    assert all(p.seconds > 0 for p in points)


def test_what_is_not_measured_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError):
        FloatRunner("veriattn", checkpoint, Setup(batch=2))
    with pytest.raises(UsageError):
        FloatRunner("veriattn", checkpoint, Setup(emulate_link=Throttle.parse("15")))
