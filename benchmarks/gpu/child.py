"""One part in a process of its own: measures, and appends each piece to the file of results when it is through."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import ids
from benchmarks.gpu.parts import Campaign, Part
from benchmarks.gpu.records import ROOT, Origin, Results
from veriattn.bench.campaign import run
from veriattn.bench.kernels import Result
from veriattn.bench.report import Point, line
from veriattn.bench.roofline import Rates
from veriattn.engine.strategies import Strategy
from veriattn.errors import InternalError


@dataclass(frozen=True)
class Job:
    """What a child is told. models: where random weights are kept. model: a real one for `ids`, if there is one."""

    device: str
    threads: int
    models: Path
    model: Path | None


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def work(part: Part, pieces: tuple[str, ...], key: str, job: Job, origin: Origin, results: Results) -> int:
    """Run the pieces. Returns the exit status; raises VeriattnError of whatever goes wrong."""
    began = time.monotonic()

    def done(piece: str, found: list[Result], more: dict[str, Any]) -> None:
        nonlocal began
        now = time.monotonic()
        results.append({
            **origin.header(), "device": job.device, "part": part.name, "settings": key, "piece": piece, "status": "done",
            "seconds": round(now - began, 1), "results": found, **more,
        })  # fmt: skip
        began = now

    if isinstance(part, Campaign):
        _campaign(part, pieces, job, done)
        return 0
    found, more, status = _PROGRAMS[part.name](job)
    if status == 0:
        done("all", found, more)
    return status


def _campaign(part: Campaign, pieces: tuple[str, ...], job: Job, done: Callable[..., None]) -> None:
    strategies: tuple[Strategy, ...] = tuple(s for s in part.strategies if s in pieces)
    directory = job.models / f"{part.shape}-{part.layers}"
    plan = part.plan(strategies, job.device, job.threads, directory)
    conditions = dataclasses.asdict(plan.conditions())

    def through(strategy: Strategy, points: list[Point], rates: Rates) -> None:
        measured = _finite(dataclasses.asdict(rates))
        done(strategy, [], {"conditions": conditions, "points": [p.to_json() for p in points], "rates": measured})

    run(plan, note, through)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if value == float("inf") else value


def _correctness(job: Job) -> tuple[list[Result], dict[str, Any], int]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0:
        command += ["-n", "4"]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        if tests.stdout is None:
            raise InternalError("no pipe from the tests")
        for text in tests.stdout:
            print(text, end="", file=sys.stderr, flush=True)
            last = text.strip() or last
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if tests.returncode == 0 and (counts.get("skipped") or not counts.get("passed")):
        note(f"error: not every test ran: {last}")
        return [], {}, 1
    passed = counts.get("passed", 0)
    return [line("gpu.tests", passed, "tests passed", met=True)], {}, tests.returncode


def _kernels(job: Job) -> tuple[list[Result], dict[str, Any], int]:
    # torch is not to be had everywhere, and needed by no other part in this process.
    from benchmarks.gpu_kernels import measure  # noqa: PLC0415

    header, found = measure(note)
    return found, {"kernels": header}, 0


def _ids(job: Job) -> tuple[list[Result], dict[str, Any], int]:
    return ids.compare(job.device, job.model, job.models, note), {}, 0


_PROGRAMS: dict[str, Callable[[Job], tuple[list[Result], dict[str, Any], int]]] = {
    "correctness": _correctness, "kernels": _kernels, "ids": _ids,
}  # fmt: skip
