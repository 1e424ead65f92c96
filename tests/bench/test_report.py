"""Results: scaling to all layers, names, bars and what meets them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from veriattn.bench.measure import Sample
from veriattn.bench.report import (
    Conditions,
    Point,
    line,
    markdown,
    measured_limit,
    point_results,
    ratio_results,
    save,
    scaled,
    sweep_results,
    table,
)
from veriattn.bench.roofline import Floor
from veriattn.bench.traffic import Bytes
from veriattn.errors import UsageError

CONDITIONS = Conditions("prefill", "llama-8b", 1, 32, "cuda", 16, None, 15.0)
SAMPLE = Sample(1.0, 0.5, 0.1, 3, 1.0, Bytes(10, 20), Bytes(10, 20), 0.7, 0.2, None, 1000, 2000)
FIELDS = {"name", "value", "unit", "bar", "met", "roofline", "fraction"}


def point(strategy: str, seconds: float, attention_s: float | None, ratio: float | str | None = None) -> Point:
    floor = Floor(seconds / 2, 0.0, 0.0, seconds / 2)
    return Point(strategy, 6144, 1, seconds, attention_s, floor, floor * 0.5, SAMPLE, ratio)


def test_scaling_leaves_the_vocabulary_out() -> None:
    assert scaled(1.5, 0.5, 1, 32) == 32.5
    assert scaled(8.5, 0.5, 4, 4) == 8.5


def test_lines() -> None:
    assert line("a", 4.0, "s", roofline=3.0)["fraction"] == 0.75
    assert line("a", 4.0, "x", roofline=8.0, higher=True)["fraction"] == 0.5
    assert line("a", 0.0, "B", roofline=0.0)["fraction"] is None
    assert line("a", 1.0, "s", roofline=float("inf"))["fraction"] is None
    assert set(line("a", 1.0, "s")) == FIELDS


def test_names_say_what_was_emulated() -> None:
    names = [r["name"] for r in point_results(CONDITIONS, point("tsdp", 4.0, 2.0))]
    assert names[0] == "prefill.llama-8b.emulated15.tsdp.n6144.b1.ttft"
    assert all(".emulated15." in n for n in names)
    assert "emulated" in CONDITIONS.title and "1 of 32 layers run, time scaled" in CONDITIONS.title


@pytest.mark.parametrize(("strategy", "bar"), [("tsdp", 2.0 / 0.7), ("full-tee", 2.0 / 0.7), ("veriattn", None)])
def test_a_baseline_must_be_near_its_floor(strategy: str, bar: float | None) -> None:
    first = point_results(CONDITIONS, point(strategy, 4.0, 2.0))[0]
    assert (first["bar"], first["met"]) == (bar, None if bar is None else False)
    near = dataclasses.replace(point(strategy, 2.5, 2.0), floor=Floor(2.0, 0, 0, 2.0))
    assert point_results(CONDITIONS, near)[0]["met"] is (None if bar is None else True)


def test_ratios_and_the_papers_bars() -> None:
    points = [point("veriattn", 2.0, 1.0), point("tsdp", 5.2, 4.0), point("full-tee", 6.0, None)]
    found = {r["name"].split("emulated15.")[1]: r for r in ratio_results(CONDITIONS, points)}
    over_tsdp = found["veriattn_over_tsdp.n6144.b1"]
    assert (over_tsdp["value"], over_tsdp["bar"], over_tsdp["met"]) == (2.6, 2.60, True)
    over_tee = found["veriattn_over_full-tee.n6144.b1"]
    assert (over_tee["value"], over_tee["bar"], over_tee["met"]) == (3.0, 3.14, False)
    attention = found["veriattn_over_tsdp.n6144.b1.attention"]
    assert (attention["value"], attention["bar"], attention["met"]) == (4.0, 4.19, False)
    assert set(found) == {
        "veriattn_over_tsdp.n6144.b1", "veriattn_over_tsdp.n6144.b1.attention", "veriattn_over_full-tee.n6144.b1",
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{"emulated_gb_per_s": None}, {"emulated_gb_per_s": 5.0}])
def test_the_bars_are_for_the_papers_link(changes: dict[str, float | None]) -> None:
    conditions = dataclasses.replace(CONDITIONS, **changes)  # type: ignore[arg-type]
    assert all(r["bar"] is None for r in ratio_results(conditions, [point("veriattn", 2, 1), point("tsdp", 5, 4)]))


def test_on_a_cpu_the_bars_are_for_scale() -> None:
    conditions = dataclasses.replace(CONDITIONS, device="cpu")
    first = ratio_results(conditions, [point("veriattn", 2, 1), point("tsdp", 5, 4)])[0]
    assert (first["bar"], first["met"]) == (2.60, None)


def test_decode_bars_need_the_papers_capacity() -> None:
    conditions = dataclasses.replace(CONDITIONS, phase="decode", prover_kv_tokens=2000)
    points = [dataclasses.replace(point(s, t, None), length=10_000) for s, t in (("run-ahead", 1.0), ("full-tee", 3.0))]
    (only,) = ratio_results(conditions, points)
    assert (only["name"].rsplit(".", 2)[0], only["bar"], only["met"]) == (
        "decode.llama-8b.emulated15.run-ahead_over_full-tee", 2.21, True,
    )  # fmt: skip
    (other,) = ratio_results(dataclasses.replace(conditions, prover_kv_tokens=0), points)
    assert other["bar"] is None


@pytest.mark.parametrize(("phase", "length", "seconds", "bar", "met"), [
    ("prefill", 6144, 5.9, 6.0, True), ("prefill", 6144, 6.1, 6.0, False), ("prefill", 3072, 9.0, None, None),
    ("decode", 10_000, 1.29, 1.3, True), ("decode", 10_000, 1.31, 1.3, False),
])  # fmt: skip
def test_the_price_of_verification(
    phase: str, length: int, seconds: float, bar: float | None, met: bool | None
) -> None:
    conditions = dataclasses.replace(CONDITIONS, phase=phase, emulated_gb_per_s=None)
    pair = [point("run-ahead", seconds, None), point("dangerous-unverified", 1.0, None)]
    (only,) = ratio_results(conditions, [dataclasses.replace(p, length=length) for p in pair])
    assert (only["value"], only["bar"], only["met"]) == (seconds, bar, met)
    assert only["name"] == f"{phase}.llama-8b.run-ahead_to_dangerous-unverified.n{length}.b1"


@pytest.mark.parametrize(("auto", "met"), [(1.09, True), (1.11, False)])
def test_the_adaptive_ratio_is_held_against_the_best_fixed_one(auto: float, met: bool) -> None:
    conditions = dataclasses.replace(CONDITIONS, phase="decode", prover_kv_tokens=0)
    points = [point("veriattn", 2.0, 1.0, 0.0), point("veriattn", 1.0, 1.0, 0.4), point("veriattn", auto, 1.0, "auto")]
    found = sweep_results(conditions, points)
    assert (found[0]["value"], found[0]["bar"], found[0]["met"]) == (auto, 1.10, met)
    assert found[1]["name"].endswith("best_fixed_ratio") and found[1]["value"] == 0.4


def test_a_point_is_read_as_it_was_written() -> None:
    before = dataclasses.replace(
        point("veriattn", 2.0, 1.0, "auto"), sample=dataclasses.replace(SAMPLE, device_bytes=5)
    )
    assert Point.from_json(json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.parametrize(("shares", "limit"), [
    ({"verifier": {"idle": 0.6}, "prover": {"idle": 0.1, "blocked": 0.2}, "link": None}, "prover"),
    ({"verifier": {"idle": 0.2}, "prover": {"idle": 0.1, "blocked": 0.2}, "link": None}, "tee"),
    ({"verifier": {"idle": 0.2}, "prover": None, "link": {"to prover": 0.1, "from prover": 0.9}}, "link"),
    (None, None),
])  # fmt: skip
def test_the_busiest_side_is_the_measured_limit(shares: dict[str, Any] | None, limit: str | None) -> None:
    assert measured_limit(dataclasses.replace(SAMPLE, shares=shares)) == limit


def test_a_table_for_documents() -> None:
    sample = dataclasses.replace(SAMPLE, device_bytes=3 * 10**9, tee_peak_bytes=15 * 10**8, prover_peak_bytes=None)
    conditions = dataclasses.replace(CONDITIONS, phase="decode")
    lines = markdown(conditions, [dataclasses.replace(point("veriattn", 0.2, 0.1, "auto"), sample=sample)]).splitlines()
    assert lines[0].startswith("| strategy | tokens | batch | p | time, ms | floor, ms |") and set(lines[1]) == set(
        "| -"
    )
    row = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert row[:8] == ["`veriattn`", "6,144", "1", "auto", "200", "100", "50%", "tee"] and row[-1] == "1.5 / - / 3.0"
    without = markdown(conditions, [point("veriattn", 0.2, 0.1)])
    assert without.startswith("| strategy | tokens | batch | time, ms |"), "no column that nobody fills"


def test_every_row_of_a_table_over_an_emulated_link_says_so() -> None:
    rows = table(CONDITIONS, [point("veriattn", 2, 1), point("tsdp", 5, None)]).splitlines()
    assert len(rows) == 4 and all("emulated" in row for row in (rows[0], *rows[2:]))


def test_results_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.jsonl"
    for name in ("a", "b"):
        save(file, {"cpu": "x"}, [line(name, 1.0, "s")])
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [r["name"] for r in lines] == ["a", "b"]
    assert set(lines[0]) == FIELDS | {"time", "cpu"}
    with pytest.raises(UsageError):
        save(tmp_path / "new" / "results.jsonl" / "below", {}, [])
