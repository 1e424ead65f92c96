"""The run of everything that needs a GPU: what counts, what is left out, what is reported, and that a failure is no end."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import bars, child, ids
from benchmarks.gpu.drive import Driver, make_kernels
from benchmarks.gpu.parts import PARTS, Campaign, Part, Program, adapted, chosen, estimate, settings
from benchmarks.gpu.records import Origin, Results, source_digest

from veriattn.bench.kernels import Result
from veriattn.bench.measure import Sample
from veriattn.bench.report import Conditions, Point, line
from veriattn.bench.roofline import Floor
from veriattn.bench.shapes import shape, write_random_model
from veriattn.bench.traffic import Bytes
from veriattn.errors import UsageError
from veriattn.spec.modelfile import ModelDirectory

MACHINE = {"commit": "abc1234", "cpu": "A CPU", "cores": 16, "isa": "avx512", "gpu": {"devices": []}}
HERE = Origin("source-of-this", "A GPU", MACHINE)
SAMPLE = Sample(1.0, 0.5, 0.1, 3, 1.0, Bytes(10, 20), Bytes(10, 20), 0.7, 0.2, None, 1000, 2000)
LINK15 = Conditions("prefill", "llama-8b", 4, 32, "cuda", 16, None, 15.0)
NATIVE = dataclasses.replace(LINK15, layers=8, emulated_gb_per_s=None)


def point(
    strategy: str, seconds: float, floor: Floor, attention_s: float | None = None, length: int = 6144, **more: Any
) -> Point:
    return Point(strategy, length, 1, seconds, attention_s, floor, floor * 0.5, dataclasses.replace(SAMPLE, **more))


def record(
    part: str, piece: str, conditions: Conditions | None = None, *points: Point, found: Sequence[Result] = ()
) -> dict[str, Any]:
    campaign = {} if conditions is None else {
        "conditions": dataclasses.asdict(conditions), "points": [p.to_json() for p in points],
    }  # fmt: skip
    start = {**HERE.header(), "device": "cuda", "part": part, "settings": "s", "piece": piece}
    return json.loads(json.dumps({**start, "status": "done", "seconds": 1.0, "results": list(found), **campaign}))  # type: ignore[no-any-return]


#: Floors limited by the bus, and by the TEE.
BUS, TEE = Floor(2.0, 0.5, 2.0, 1.0), Floor(8.0, 0.0, 0.0, 8.0)
CANNED = [
    record("link15-8b", "veriattn", LINK15, point("veriattn", 3.0, BUS, 1.0),
           *(point("veriattn", 1.0, BUS, 0.5, n) for n in (1024, 3072))),
    record("link15-8b", "tsdp", LINK15, point("tsdp", 8.1, BUS * 3, 4.0)),
    record("link15-8b", "full-tee", LINK15, point("full-tee", 9.0, TEE, 3.5)),
    record("prefill-8b", "run-ahead", NATIVE, point("run-ahead", 6.5, BUS)),
    record("prefill-8b", "dangerous-unverified", NATIVE, point("dangerous-unverified", 1.0, Floor(0.5, 0.5, 0.0, 0.0))),
    record("kernels", "all", found=[
        line("gemm.rate.1024x4096x4096", 0.7, "r", bar=0.6, met=True),
        line("gemm.rate.2048x4096x4096", 0.9, "r", bar=0.6, met=True),
        line("prefill_attention.6144.over_flash", 3.5, "x", bar=3.0, met=False, roofline=1.5),
        line("prefill_attention.table.6144.over_flash", 4.5, "x"),
    ]),
    record("ids", "all", found=[line("ids.equal", 384, "ids equal", met=True)]),
]  # fmt: skip


def row(what: str, records: Sequence[dict[str, Any]] = CANNED) -> bars.Row:
    (found,) = (r for r in bars.rows(bars.figures(records)) if r.what == what)
    return found


SPEED_UP = "8B, 15 GB/s emulated, batch 1: TTFT at 6,144, `veriattn` over "


@pytest.mark.parametrize(("what", "bar", "measured", "state", "floor", "limit"), [
    (SPEED_UP + "`tsdp`", ">= 2.6", "2.7", "met", "3", "veriattn: bus; tsdp: bus"),
    (SPEED_UP + "`full-tee`", ">= 3.14", "3", "not met", "4", "veriattn: bus; full-tee: TEE"),
    (SPEED_UP.replace("batch 1", "batch 5") + "`tsdp`", ">= 2.6", "-", "missing", "-", "-"),
    ("8B, 15 GB/s emulated, batch 1: attention alone, `veriattn` over `tsdp`", ">= 4.19", "4", "not met", "3",
     "veriattn: bus; tsdp: bus"),
    ("8B, 15 GB/s emulated, batch 1: TTFT at 6,144, `run-ahead` over `tsdp`", ">= 5", "-", "missing", "-", "-"),
    ("`tsdp` of its own roofline: 8B, prompt of 6,144, 15 GB/s emulated", ">= 70%", "74% (8.1 s)", "met", "6 s", "bus"),
    ("`full-tee` of its own roofline: 8B, prompt of 6,144, bus as it is", ">= 70%", "-", "missing", "-", "-"),
    ("8B, bus as it is: TTFT at 6,144, `run-ahead` over unverified", "<= 6", "6.5", "not met", "4",
     "run-ahead: bus; dangerous-unverified: GPU"),
    ("8B, bus as it is: TPOT at 10,000, `run-ahead` over unverified", "<= 1.3", "-", "missing", "-", "-"),
    ("int8 products of 1,024 rows and more, of the best int8 rate seen", ">= 60%", "70% at worst (1024x4096x4096)", "met",
     "100%", "GPU"),
    ("attention of a prompt of 6,144 over bf16 FlashAttention", "<= 3", "3.5", "not met", "1.5", "GPU"),
    ("attention of a prompt of 1,024 over bf16 FlashAttention", "<= 3", "-", "missing", "-", "-"),
    ("kernels, backend and sessions: bit equality", "all", "-", "missing", "-", "-"),
    ("token ids and logits of every flow beside the CPU backend's", "equal", "384 ids equal", "met", "-", "-"),
])  # fmt: skip
def test_bars(what: str, bar: str, measured: str, state: str, floor: str, limit: str) -> None:
    assert row(what) == bars.Row(what, bar, measured, state, floor, limit)


def test_traffic_is_held_against_paper() -> None:
    what = "8B, prompt of 6,144: attention's traffic under `veriattn` is linear in tokens"
    assert row(what).state == "met" and row(what).measured.startswith(
        "39.07 kB a token and layer at 1,024, 39.08 at 6,144; 7.61 MB a token"
    )
    points = [point("veriattn", 1.0, BUS, 0.5, n, moved=Bytes(10, 21)) for n in (1024, 3072, 6144)]
    wrong = record("link15-8b", "veriattn", LINK15, *points)
    assert row(what, [*CANNED, wrong]).state == "not met"
    assert row(what.replace("veriattn", "run-ahead")).state == "missing"


def test_on_a_cpu_speed_ups_are_for_scale() -> None:
    cpu = [r | {"conditions": r["conditions"] | {"device": "cpu"}} for r in CANNED if "conditions" in r]
    assert row(SPEED_UP + "`tsdp`", cpu).state == "for scale"


def test_the_last_of_a_piece_counts_and_success_ends_a_failure() -> None:
    slower = record("link15-8b", "veriattn", LINK15, point("veriattn", 4.0, BUS, 1.0))
    assert row(SPEED_UP + "`tsdp`", [*CANNED, slower]).state == "not met"
    failed = {**record("correctness", "-"), "status": "failed", "tail": ["E  wrong bits", "2 failed, 90 passed in 80s"]}
    what = "kernels, backend and sessions: bit equality"
    assert row(what, [*CANNED, failed]) == bars.Row(what, "all", "2 failed, 90 passed in 80s", "failed")
    done = record("correctness", "all", found=[line("gpu.tests", 92, "tests passed", met=True)])
    assert row(what, [*CANNED, failed, done]) == bars.Row(what, "all", "92 tests passed", "met")


def test_the_document_has_all_of_it() -> None:
    text = bars.document(bars.figures(CANNED), CANNED)
    assert text.startswith("A GPU; 16 cores of A CPU (avx512); abc1234;")
    assert (
        "## link15-8b: prefill, llama-8b, cuda prover, 16 thread(s) in the TEE; 4 of 32 layers run, time scaled; link of"
        in text
    )
    assert "| `veriattn` | 6,144 | 1 | 3 | 2 | 67% | link | - | 1 | 0.00 / 0.00 |" in text
    assert bars.document(bars.figures([]), []).startswith("Nothing has been measured.")


# -- what counts ------------------------------------------------------------------------------------------------------


PART = next(p for p in PARTS if p.name == "link15-8b")


def test_other_code_other_cards_and_other_settings_do_not_count(tmp_path: Path) -> None:
    results = Results(tmp_path / "new" / "gpu.jsonl", ["source-of-this"])
    assert results.missing(PART, "s", "A GPU") == PART.pieces and results.latest_card() is None
    for r in CANNED[:2]:
        results.append(r)
    assert results.missing(PART, "s", "A GPU") == ("run-ahead", "full-tee")
    assert results.missing(PART, "other settings", "A GPU") == PART.pieces
    assert results.missing(PART, "s", "Another GPU") == PART.pieces
    assert Results(results.file, ["of another commit"]).missing(PART, "s", "A GPU") == PART.pieces
    assert Results(results.file, ["of another commit"]).latest_card() is None
    assert Results(results.file, ["of another commit", "source-of-this"]).missing(PART, "s", "A GPU") == (
        "run-ahead",
        "full-tee",
    )
    with results.file.open("a") as file:
        file.write('{"cut off')
    assert len(results.of("A GPU")) == 2


def test_settings_are_what_a_result_depends_on() -> None:
    assert isinstance(PART, Campaign)
    assert settings(PART) == settings(dataclasses.replace(PART, what="said otherwise", limit_s=1.0))
    changed = [dataclasses.replace(PART, layers=5), adapted(PART, None, "tiny"), adapted(PART, 1, None)]
    assert len({settings(p) for p in (PART, *changed)}) == 4 and settings(PART, "16 threads") != settings(PART)


def test_a_digest_of_the_code(tmp_path: Path) -> None:
    for name in ("src/a.py", "native/b.cpp", "docs/c.md", "CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    first = source_digest(tmp_path)
    (tmp_path / "docs/c.md").write_text("changed")
    assert source_digest(tmp_path) == first
    (tmp_path / "native/b.cpp").write_text("changed")
    assert source_digest(tmp_path) != first


def test_parts_by_name_and_what_they_take() -> None:
    assert [p.name for p in chosen(None)][:3] == ["correctness", "kernels", "ids"]
    assert [p.name for p in chosen("sweep, kernels")] == ["kernels", "sweep"]
    with pytest.raises(UsageError, match="no part coffee"):
        chosen("coffee")
    for part in PARTS:
        if isinstance(part, Campaign):
            part.plan(part.strategies, "cpu", 1, None).check()
            adapted(part, None, "tiny").plan(part.strategies, "cpu", 1, None).check()  # type: ignore[union-attr]
    whole = sum(estimate(p, p.pieces)[0] for p in chosen(None))
    assert whole < 26 * 60, "everything within about 25 minutes"
    assert estimate(PART, ("tsdp",))[1] > 5 * estimate(PART, ("full-tee",))[1] == 0


# -- running ----------------------------------------------------------------------------------------------------------


def driver(tmp_path: Path, code: dict[str, str], device: str = "cuda") -> Driver:
    """Parts are snippets of Python."""

    def command(part: Part, pieces: tuple[str, ...]) -> list[str]:
        done = json.dumps(record(part.name, "all"))
        snippet = code[part.name].replace("DONE", f"open({str(tmp_path / 'r')!r}, 'a').write({done!r} + chr(10))")
        return [sys.executable, "-c", snippet]

    return Driver(
        Results(tmp_path / "r", ["source-of-this"]), HERE, device, command, lambda part: "s", kernels=tmp_path / "k"
    )


def programs(*names: str, limit_s: float = 60.0) -> list[Part]:
    return [Program(name, "a test", 0.1, limit_s) for name in names]


def test_a_part_that_fails_is_noted_and_the_others_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_kernels(tmp_path / "k")
    (tmp_path / "k" / "half").touch()
    d = driver(tmp_path, {"ids": "print('first'); print('last words'); raise SystemExit(3)", "kernels": "DONE"})
    outcome = d.run(programs("ids", "kernels"))
    assert (outcome.failed, outcome.complete, outcome.left) == (["ids"], ["kernels"], [])
    (failed, done) = d.results.all()
    assert (failed["status"], failed["tail"]) == ("failed", ["first", "last words"]) and done["status"] == "done"
    assert "ids: failed with exit code 3" in capfd.readouterr().err
    assert list((tmp_path / "k").iterdir()) == [], "what it left compiled is not to be trusted"
    # What is complete is not run again, what failed is; unless everything is asked for again.
    again = driver(tmp_path, {"ids": "DONE", "kernels": "raise SystemExit(9)"})
    assert dataclasses.asdict(again.run(programs("ids", "kernels"))) == {
        "complete": ["ids", "kernels"], "failed": [], "left": [], "skipped": [],
    }  # fmt: skip
    assert again.run(programs("kernels"), again=True).failed == ["kernels"]


def test_a_part_over_its_limit_is_ended(tmp_path: Path) -> None:
    d = driver(tmp_path, {"ids": "import time; print('begun', flush=True); time.sleep(60)"})
    assert d.run(programs("ids", limit_s=1.0)).failed == ["ids"]
    (record_,) = d.results.all()
    assert record_["tail"] == ["begun", "ended at the limit of 1 s"]


def test_a_budget_leaves_parts_for_the_next_run(tmp_path: Path) -> None:
    d = driver(tmp_path, {"ids": "import time; time.sleep(60)", "kernels": "DONE"})
    outcome = d.run(programs("ids", "kernels"), budget_s=1.0)
    assert (outcome.failed, outcome.left) == ([], ["ids", "kernels"])
    assert [r["status"] for r in d.results.all()] == ["cut"]
    assert driver(tmp_path, {"ids": "DONE", "kernels": "DONE"}).run(programs("ids", "kernels")).complete == [
        "ids",
        "kernels",
    ]


def test_what_needs_a_gpu_is_left_out_without_one(tmp_path: Path) -> None:
    outcome = driver(tmp_path, {}, device="cpu").run(programs("correctness"))
    assert outcome.skipped == ["correctness"] and not outcome.failed


OPTIONS = ["--device", "cpu", "--shape-override", "tiny", "--threads", "1"]


def test_a_rehearsal_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS, "--out", str(tmp_path / "out"), "--model-dir", str(tmp_path / "models")]
    assert program.main([*options, "--parts", "correctness,sweep"]) == 0
    out, err = capfd.readouterr()
    assert "correctness: skipped, it needs a GPU" in err and "sweep: done in" in err
    title = "## sweep: decode, tiny, cpu prover, 1 thread(s) in the TEE, 1 in the prover; the prover keeps 0 keys"
    assert title in out and title in (tmp_path / "out" / "gpu.md").read_text()
    (found,) = (json.loads(text) for text in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines())
    assert (found["part"], found["piece"], found["status"], len(found["points"])) == ("sweep", "veriattn", "done", 18)
    assert program.main([*options, "--parts", "sweep"]) == 0
    assert "sweep: complete" in capfd.readouterr().err
    assert program.main([*options, "--list"]) == 0
    assert "              complete\n" in capfd.readouterr().out
    assert program.main(["--report", "--out", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().out == out


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS, "--out", str(tmp_path), "--model-dir", str(tmp_path / "models"), "--parts", "ids"]
    monkeypatch.setattr(program._Run, "command", lambda *_: [sys.executable, "-c", "print('why'); raise SystemExit(4)"])
    assert program.main(options) == 1
    out, err = capfd.readouterr()
    assert "The part `ids` failed: why" in out and err.endswith("failed: ids\n")
    assert program.main([*options[:-1], "coffee"]) == 2
    assert "error: no part coffee" in capfd.readouterr().err


# -- token ids --------------------------------------------------------------------------------------------------------


def test_ids_of_every_flow_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_model(tmp_path / "tiny", shape("tiny"))
    monkeypatch.setattr(ids, "PROMPTS", (7, 300))
    monkeypatch.setattr(ids, "ANSWER", 3)
    found = ids.compare("cpu", tmp_path / "tiny", tmp_path, lambda text: None)
    assert [(r["name"], r["value"], r["met"]) for r in found] == [("ids.equal", 4 * 2 * 3, True)]
    answers: Callable[..., Any] = ids._answers
    monkeypatch.setattr(
        ids, "_answers", lambda model, flow, device: (a + (flow.value == "tsdp") for a in answers(model, flow, device))
    )
    with pytest.raises(Exception, match="tsdp on cpu: logits of step 0 are not"):
        ids.compare("cpu", tmp_path / "tiny", tmp_path, lambda text: None)


def test_a_model_is_shortened(tmp_path: Path) -> None:
    write_random_model(tmp_path / "whole", shape("tiny"))
    ids.shorten(tmp_path / "whole", tmp_path / "short", layers=1, vocabulary=100)
    whole, short = ({n: list(rows) for n, _, rows in ModelDirectory(tmp_path / d).stream()} for d in ("whole", "short"))
    config = ModelDirectory(tmp_path / "short").config
    assert (config.num_layers, config.vocab_size) == (1, 100) and set(short) < set(whole)
    assert all(np.array_equal(short[n], whole[n][: len(short[n])]) for n in short)


def test_tests_that_did_not_run_are_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = child.Job("cuda", 1, tmp_path, None)

    class Tests:
        """What pytest would print."""

        last, returncode = "", 0

        def __init__(self, *_: Any, **__: Any) -> None:
            self.stdout = ["....\n", f"{self.last}\n"]

        def __enter__(self) -> Tests:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(child.subprocess, "Popen", Tests)
    monkeypatch.setattr(child.subprocess, "run", lambda *_, **__: Tests())
    for last, status in (
        ("92 passed in 80.00s", 0),
        ("90 passed, 2 skipped in 80.00s", 1),
        ("no tests ran in 0.01s", 1),
    ):
        Tests.last = last
        found, _, got = child._correctness(job)
        assert got == status and [r["value"] for r in found if not status] == [92] * (not status)
