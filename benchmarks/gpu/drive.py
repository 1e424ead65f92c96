"""Runs parts one after the other, each in a process of its own with a limit; what is complete is left out."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.child import note
from benchmarks.gpu.parts import Campaign, Part, estimate
from benchmarks.gpu.records import ROOT, Origin, Results
from veriattn.bench.runner import KERNELS_VARIABLE

#: Lines of a part that failed which are kept.
TAIL_LINES = 12
#: With less than this left a part is not begun, even where its pieces could be kept one by one.
_WORTH_IT_S = 90.0
_GRACE_S = 10.0


@dataclass
class Outcome:
    """Names of parts. left: those that the budget had no room for, or ended."""

    complete: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Driver:
    """command: what to start for these pieces of a part. key: settings of a part (`parts.settings`)."""

    results: Results
    origin: Origin
    device: str
    command: Callable[[Part, tuple[str, ...]], Sequence[str]]
    key: Callable[[Part], str]
    written: Callable[[Part], bool] = lambda part: False
    kernels: Path | None = None

    def run(self, parts: Sequence[Part], budget_s: float | None = None, again: bool = False) -> Outcome:
        """In order, as far as the budget goes."""
        outcome, began = Outcome(), time.monotonic()
        for part in parts:
            if part.needs_gpu and self.device == "cpu":
                note(f"{part.name}: skipped, it needs a GPU")
                outcome.skipped.append(part.name)
                continue
            pieces = part.pieces if again else self.results.missing(part, self.key(part), self.origin.card)
            if not pieces:
                note(f"{part.name}: complete")
                outcome.complete.append(part.name)
                continue
            seconds, crossing = estimate(part, pieces, self.written(part))
            left = None if budget_s is None else budget_s - (time.monotonic() - began)
            needed = min(seconds, _WORTH_IT_S) if isinstance(part, Campaign) else seconds
            if left is not None and left < needed:
                note(f"{part.name}: left for the next run, about {seconds:.0f} s")
                outcome.left.append(part.name)
                continue
            note(f"{part.name}: {part.what}; {told(pieces, seconds, crossing)}")
            {"done": outcome.complete, "failed": outcome.failed, "cut": outcome.left}[
                self._one(part, pieces, left)
            ].append(part.name)
        return outcome

    def _one(self, part: Part, pieces: tuple[str, ...], left: float | None) -> str:
        began, limit = time.monotonic(), part.limit_s if left is None else min(part.limit_s, left)
        status, tail = self._process(self.command(part, pieces), limit)
        took = time.monotonic() - began
        if status == 0:
            note(f"{part.name}: done in {took:.0f} s")
            return "done"
        cut = status is None and limit < part.limit_s
        why = "the budget" if cut else f"the limit of {part.limit_s:.0f} s"
        if status is None:
            tail.append(f"ended at {why}")
        note(f"{part.name}: {'ended at ' + why if status is None else f'failed with exit code {status}'}")
        self.results.append({
            **self.origin.header(), "device": self.device, "part": part.name, "settings": self.key(part), "piece": "-",
            "status": "cut" if cut else "failed", "seconds": round(took, 1), "tail": tail,
        })  # fmt: skip
        self._forget_kernels()
        return "cut" if cut else "failed"

    def _forget_kernels(self) -> None:
        """Whoever was ended may have left half a kernel, which provers of other users could not replace."""
        if self.kernels is not None and self.kernels.exists():
            shutil.rmtree(self.kernels)
            make_kernels(self.kernels)

    def _process(self, command: Sequence[str], limit_s: float) -> tuple[int | None, list[str]]:
        """(exit status, None at the limit; its last lines, up to the limit)."""
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        if self.kernels is not None:
            environment[KERNELS_VARIABLE] = str(self.kernels)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        reader = threading.Thread(target=_forward, args=(process, tail), daemon=True)
        reader.start()
        status: int | None = None
        last: list[str] | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            last = list(tail)
            # As by a keyboard: temporary files go, and provers with their verifier.
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
        reader.join(_GRACE_S)
        return status, list(tail) if last is None else last


def told(pieces: tuple[str, ...], seconds: float, crossing: int) -> str:
    """An estimate, for people."""
    which = "" if pieces == ("all",) else f"{', '.join(pieces)}: "
    return f"{which}about {seconds:.0f} s" + (f", {crossing / 1e9:.1f} GB over the link" if crossing else "")


def make_kernels(directory: Path) -> None:
    """Where provers of any user may keep what they compiled."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o1777)


def _forward(process: subprocess.Popen[str], tail: deque[str]) -> None:
    for text in process.stdout or ():
        print(f"  {text}", end="", file=sys.stderr, flush=True)
        if text.strip():
            tail.append(text.rstrip()[:300])


def _signal(process: subprocess.Popen[str], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
