"""Traces: both sides, every layer and tile, shares that add up; a prover's spans are untrusted text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from veriattn import trace as tracing
from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import Strategy
from veriattn.errors import ConfigError, UsageError
from veriattn.trace import NO_TRACE, FileTrace, ProverFile, Span, Trace, summary, table, to_chrome, with_replay
from veriattn.wire.emulate import Throttle

REQUEST = Request(tuple(range(100)), max_tokens=3, ignore_eos=True)


def spans_of(text: str, track: str) -> list[dict[str, object]]:
    events = json.loads(text)["traceEvents"]
    tids = {e["tid"] for e in events if e["ph"] == "M" and e["name"] == "thread_name" and e["args"]["name"] == track}
    return [e for e in events if e["ph"] == "X" and e["tid"] in tids]


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn", "tsdp", "dangerous-unverified"])
@pytest.mark.parametrize("link", ["memfd", "emulated", "tcp"])
def test_both_sides(strategy: Strategy, link: str, tiny_model: Path, listening_prover: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    config = EngineConfig(
        strategy=strategy,
        trace=path,
        emulate_link=Throttle(1.0) if link == "emulated" else None,
        prover_address=listening_prover if link == "tcp" else None,
    )
    with Engine(tiny_model, config) as engine:
        assert engine.generate([REQUEST])[0].output_ids
    text, result = path.read_text(), engine.trace_summary
    assert result is not None and result["steps"] == 3
    assert sum(result["verifier"].values()) == pytest.approx(1.0)
    assert (result["link"] is not None) == (link == "emulated")
    assert (result["prover"] is not None) == (link != "tcp")  # a remote prover keeps its times to itself
    assert "verifier" in table(result)
    kinds = {e["cat"] for e in spans_of(text, "verifier")}
    assert "replay" in kinds and ("check" in kinds) == (strategy != "dangerous-unverified")
    if link != "tcp":
        assert "compute" in {e["cat"] for e in spans_of(text, "prover")}
        assert sum(result["prover"].values()) == pytest.approx(1.0)
    if strategy != "dangerous-unverified":
        checked = {str(e["name"]) for e in spans_of(text, "verifier") if e["cat"] == "check"}
        for layer in range(2):
            for name in ("qkv", "o", "gate_up", "down"):
                assert f"check layers.{layer}.{name}" in checked
        assert "check lm_head" in checked
    if strategy == "veriattn":  # per tile: two head blocks of one KV head, 16 tiles of 7 rows
        tiles = {n for n in checked if n.startswith("check layers.1.attention heads")}
        assert len(tiles) == 2 * 15 + 1  # 100 rows make 15 tiles; a decode step has one
        assert "check layers.1.attention heads 3-5 rows 7-13" in tiles
    if link == "emulated":
        assert spans_of(text, "link from prover") or strategy == "dangerous-unverified"


def test_off_costs_nothing_and_records_nothing(tiny_model: Path) -> None:
    with Engine(tiny_model, EngineConfig()) as engine:
        engine.generate([REQUEST])
    assert engine.trace_summary is None
    assert NO_TRACE.spans == []
    assert NO_TRACE.span("check") is NO_TRACE.span("idle")  # no object per span


def test_refusals(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Engine(tiny_model, EngineConfig(strategy="full-tee", trace=tmp_path / "t"))
    engine = Engine(tiny_model, EngineConfig(trace=tmp_path / "none" / "t"))
    with pytest.raises(UsageError, match="cannot write the trace"):
        engine.close()


def test_gaps_become_replay() -> None:
    spans = [
        Span("verifier", "step", "step 0", 0.0, 10.0),
        Span("verifier", "idle", "a", 1.0, 2.0),
        Span("verifier", "check", "b", 2.0, 4.0),
        Span("verifier", "check", "after", 11.0, 12.0),
        Span("prover", "compute", "a", -1.0, 3.0),
    ]
    filled = [s for s in with_replay(spans) if s.kind == "replay"]
    assert filled == [Span("verifier", "replay", "step 0", 0.0, 1.0), Span("verifier", "replay", "b", 4.0, 10.0)]
    result = summary(spans)
    assert result["verifier"] == {"idle": 0.1, "copy-in": 0.0, "check": 0.2, "send": 0.0, "replay": 0.7}
    assert result["prover"]["compute"] == pytest.approx(
        1.0
    )  # 0.3 measured inside of the step, the rest not accounted for


def test_nothing_recorded() -> None:
    assert summary([]) == {"steps": 0, "wall_s": 0, "verifier": None, "link": None, "prover": None}
    assert json.loads(to_chrome([], "x"))["traceEvents"]
    assert table(summary([]))


def test_prover_file_is_untrusted() -> None:
    """Lines that do not parse are dropped, labels are made printable, sizes are bounded, the path is not followed."""
    file = ProverFile()
    good = FileTrace(file.path)
    good.label = "layers.0.qkv"
    good.add("compute", 1.0, 2.0)
    good.flush()
    bad = [
        "check\t1\t2\tforged as ours", "compute\t5\t4\tbackwards", "compute\t-1\t4\tx", "compute\tx\t4\tx", "compute\t1\t2",
        "compute\t" + "9" * 30 + "\t" + "9" * 31 + "\tx", "compute\t1\t2\tx\ty", "", "\0\0",
    ]  # fmt: skip
    with open(file.path, "ab") as f:
        f.write(("\n".join(bad) + "\nidle\t1\t2\t\x1b[31mred" + "x" * 500 + "\n").encode() + b"\xff\xfe\n")
    link = Path(file.path)
    link.unlink()
    link.symlink_to("/etc/passwd")
    spans = file.spans()
    file.close()
    assert spans[0] == Span("prover", "compute", "layers.0.qkv", 1.0, 2.0)
    assert len(spans) == 2
    assert spans[1].label.startswith(" [31mred") and len(spans[1].label) == 80
    assert not link.parent.exists()


def test_prover_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MAX_PROVER_BYTES", 1000)
    file = ProverFile()
    fd = os.open(file.path, os.O_WRONLY)
    os.ftruncate(fd, 1 << 40)
    os.pwrite(fd, b"idle\t1\t2\tx\n" * 200, 0)
    os.close(fd)
    assert 0 < len(file.spans()) <= 1000 // 11 + 1
    file.close()


def test_threads_get_their_own_track() -> None:
    import threading

    trace = Trace()
    with trace.span("step", "s"):
        thread = threading.Thread(target=lambda: trace.add("send", 0.0, 1.0, "x"))
        thread.start()
        thread.join()
    assert [s.track for s in trace.spans] == ["verifier, sending", "verifier"]
