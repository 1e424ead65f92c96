"""Spans of time on both sides of the link, as a Chrome/Perfetto trace and as shares; next to no cost while off."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

#: Where a prover that was started here may write its spans; the verifier's side merges them.
TRACE_VARIABLE = "VERIATTN_TRACE"

#: What a span says of its thread. `replay` is the verifier's rest of a step: norms, rotary embedding, activations, Python.
VERIFIER_KINDS = ("idle", "copy-in", "check", "send", "replay")
PROVER_KINDS = ("compute", "send", "blocked", "idle")
LINK_KINDS = ("to prover", "from prover")

_MAX_PROVER_BYTES = 64 << 20
_MAX_LABEL = 80
_COLOURS = {
    "idle": "grey",
    "blocked": "grey",
    "copy-in": "thread_state_iowait",
    "check": "thread_state_running",
    "replay": "thread_state_runnable",
    "compute": "rail_animation",
    "send": "rail_response",
    "to prover": "rail_load",
    "from prover": "rail_load",
}


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds of the machine's monotonic clock, which its processes share."""

    track: str
    kind: str
    label: str
    start: float
    stop: float


class Trace:
    """Collects spans. `label` names the operation at hand ("layers.3.qkv"), for whatever is recorded next.

    One thread records checks; sending and emulated links may record from theirs (appending to a list is atomic).
    """

    enabled = True

    def __init__(self, track: str = "verifier") -> None:
        self.track = track
        self.label = ""
        self.spans: list[Span] = []
        self._main = threading.get_ident()

    def add(self, kind: str, start: float, stop: float, label: str | None = None, track: str | None = None) -> None:
        """Record a span; a thread other than the one that made the trace gets a track of its own."""
        if track is None:
            track = self.track if threading.get_ident() == self._main else f"{self.track}, sending"
        self.spans.append(Span(track, kind, self.label if label is None else label, start, stop))

    def span(self, kind: str, label: str | None = None) -> AbstractContextManager[None]:
        """Record the time inside a `with`. The thread of the steps is the main one."""
        if kind == "step":
            self._main = threading.get_ident()
        return _Timed(self, kind, label)

    def waited(self, kind: str, start: float, waited_s: float, then: str, label: str | None = None) -> None:
        """From `start` until now: so long in waiting, the rest in `then`. Shares are exact, the border is not."""
        now = time.monotonic()
        border = min(start + waited_s, now)
        if border > start:
            self.add(kind, start, border, label)
        self.add(then, border, now, label)


class _Timed:
    def __init__(self, trace: Trace, kind: str, label: str | None) -> None:
        self._trace, self._kind, self._label = trace, kind, label

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._trace.add(self._kind, self._start, time.monotonic(), self._label)


class NoTrace(Trace):
    """The trace while there is none."""

    enabled = False
    _nothing = nullcontext()

    def add(self, *_: Any, **__: Any) -> None:
        return

    def span(self, kind: str, label: str | None = None) -> AbstractContextManager[None]:
        return self._nothing


NO_TRACE = NoTrace()


# -- the prover's side ------------------------------------------------------------------------------------------------


class FileTrace(Trace):
    """The prover's spans, appended to a file that the verifier made. Lines: kind TAB start ns TAB stop ns TAB label."""

    def __init__(self, path: str) -> None:
        super().__init__("prover")
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def flush(self) -> None:
        """Write what has been recorded."""
        lines = [f"{s.kind}\t{int(s.start * 1e9)}\t{int(s.stop * 1e9)}\t{s.label}\n" for s in self.spans]
        self.spans.clear()
        if lines:
            os.write(self._fd, "".join(lines).encode())


class ProverFile:
    """A file that a prover of another user may append to, and that is read back through a descriptor kept since."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="veriattn-trace-")
        Path(self._directory.name).chmod(0o711)
        self.path = str(Path(self._directory.name) / "spans")
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(self._fd, 0o622)

    def spans(self) -> list[Span]:
        """What the prover says it did. Trust: untrusted and informational; malformed lines are dropped."""
        found = []
        for line in os.pread(self._fd, _MAX_PROVER_BYTES, 0).decode("utf-8", "replace").split("\n"):
            fields = line.split("\t")
            if len(fields) != 4 or fields[0] not in PROVER_KINDS:
                continue
            kind, start, stop, label = fields
            if not all(t.isascii() and t.isdigit() and len(t) < 20 for t in (start, stop)) or int(stop) < int(start):
                continue
            label = "".join(ch if ch.isprintable() else " " for ch in label)[:_MAX_LABEL]
            found.append(Span("prover", kind, label, int(start) * 1e-9, int(stop) * 1e-9))
        return found

    def close(self) -> None:
        os.close(self._fd)
        self._directory.cleanup()


# -- results ----------------------------------------------------------------------------------------------------------


def with_replay(spans: Sequence[Span]) -> list[Span]:
    """The spans, with the gaps between the verifier's within each step filled in as `replay`; steps taken out."""
    steps = sorted((s for s in spans if s.kind == "step"), key=lambda s: s.start)
    rest = [s for s in spans if s.kind != "step"]
    busy = sorted((s for s in rest if s.track == "verifier"), key=lambda s: s.start)
    gaps, i = [], 0
    for step in steps:
        at, label = step.start, step.label
        while i < len(busy) and busy[i].start < step.stop:
            if busy[i].start > at:
                gaps.append(Span("verifier", "replay", label, at, busy[i].start))
            at, label = max(at, busy[i].stop), busy[i].label
            i += 1
        if step.stop > at:
            gaps.append(Span("verifier", "replay", label, at, step.stop))
    return rest + gaps


def summary(spans: Sequence[Span]) -> dict[str, Any]:
    """Seconds within steps, and each side's shares of them. Prover: null where it sent no spans."""
    steps = [s for s in spans if s.kind == "step"]
    wall = sum(s.stop - s.start for s in steps)
    result: dict[str, Any] = {"steps": len(steps), "wall_s": wall}
    inside = _clip(with_replay(spans), steps)

    def shares(track: str, kinds: Iterable[str]) -> dict[str, float] | None:
        mine = [s for s in inside if s.track == track]
        if not mine or not wall:
            return None
        return {k: sum(s.stop - s.start for s in mine if s.kind == k) / wall for k in kinds}

    result["verifier"] = shares("verifier", VERIFIER_KINDS)
    result["link"] = shares("link", LINK_KINDS)
    result["prover"] = shares("prover", PROVER_KINDS)
    if result["prover"] is not None:
        # What it does not account for (decoding requests, its own elementwise work after the last claim) is its compute.
        result["prover"]["compute"] += max(0.0, 1.0 - sum(result["prover"].values()))
    return result


def _clip(spans: Sequence[Span], steps: Sequence[Span]) -> list[Span]:
    """Parts of spans within the steps, which do not overlap."""
    ordered, edges, out = sorted(spans, key=lambda s: s.start), sorted((s.start, s.stop) for s in steps), []
    first = 0
    for s in ordered:
        while first < len(edges) and edges[first][1] <= s.start:
            first += 1
        for start, stop in edges[first:]:
            if start >= s.stop:
                break
            out.append(Span(s.track, s.kind, s.label, max(s.start, start), min(s.stop, stop)))
    return out


def to_chrome(spans: Sequence[Span], title: str) -> str:
    """JSON for chrome://tracing and ui.perfetto.dev: one process per side, microseconds from the first span."""
    spans = with_replay(spans) + [s for s in spans if s.kind == "step"]
    zero = min((s.start for s in spans), default=0.0)
    tracks: dict[str, tuple[int, int]] = {}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_labels", "pid": 1, "args": {"labels": title}}]
    for s in sorted(spans, key=lambda s: s.start):
        name = {"step": "steps", "verifier": "verifier"}.get(s.kind if s.kind == "step" else s.track, s.track)
        if s.track == "link":
            name = f"link {s.kind}"
        if name not in tracks:
            process = 3 if s.track == "prover" else 2 if s.track == "link" else 1
            tracks[name] = process, len(tracks) + 1
            events.append(
                {"ph": "M", "name": "thread_name", "pid": process, "tid": len(tracks), "args": {"name": name}}
            )
        pid, tid = tracks[name]
        event = {"ph": "X", "name": f"{s.kind} {s.label}".strip(), "cat": s.kind, "pid": pid, "tid": tid}
        event |= {"ts": round((s.start - zero) * 1e6, 1), "dur": round((s.stop - s.start) * 1e6, 1)}
        if s.kind in _COLOURS:
            event["cname"] = _COLOURS[s.kind]
        layer = s.label.split(".")
        if len(layer) > 1 and layer[0] == "layers" and layer[1].isdigit():
            event["args"] = {"layer": int(layer[1])}
        events.append(event)
    for pid, name in ((1, "verifier (trusted)"), (2, "emulated link"), (3, "prover (untrusted, as it says)")):
        if any(p == pid for p, _ in tracks.values()):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def table(result: dict[str, Any]) -> str:
    """A summary for people."""
    lines = [f"{result['steps']} steps, {result['wall_s']:.3f} s"]
    for side in ("verifier", "link", "prover"):
        if result[side] is not None:
            cells = "  ".join(f"{kind} {share:6.1%}" for kind, share in result[side].items())
            lines.append(f"{side:9} {cells}")
    return "\n".join(lines)
