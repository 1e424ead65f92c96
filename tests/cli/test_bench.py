"""`bench` as people start it: tiny shapes, every field of the JSON, pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Cli

from veriattn.bench import kernels as kernel_bench
from veriattn.bench.report import line
from veriattn.cli.bench import numbers
from veriattn.engine.strategies import STRATEGIES
from veriattn.errors import UsageError

FIELDS = {"name", "value", "unit", "bar", "met", "roofline", "fraction"}
POINT = {
    "strategy", "length", "batch", "ratio", "seconds", "attention_s", "limit", "floor", "attention_floor", "measured",
}  # fmt: skip
QUICK = ("--shape", "tiny", "--threads", 1, "--rates-seconds", 0, "--json")


def test_prefill(cli: Cli, tmp_path: Path) -> None:
    saved = tmp_path / "prefill.jsonl"
    done = cli(
        "bench", "prefill", *QUICK, "--layers", 1, "--lengths", "32,80", "--batch", "1,2", "--repetitions", 1,
        "--emulate-link", "15,2", "--save", saved,
    )  # fmt: skip
    assert done.code == 0, done.err
    data = done.json
    assert set(data) == {"results", "points", "conditions", "emulated_link", "rates", "machine"}
    assert data["emulated_link"] == {"gb_per_s": 15.0, "latency_us": 2.0}
    assert data["conditions"] == {
        "phase": "prefill", "shape": "tiny", "layers": 1, "model_layers": 2, "device": "cpu", "threads": 1,
        "prover_threads": 1, "emulated_gb_per_s": 15.0, "prover_kv_tokens": None,
    }  # fmt: skip
    assert all(set(r) == FIELDS for r in data["results"])
    names = [r["name"] for r in data["results"]]
    assert len(set(names)) == len(names) and all(n.startswith("prefill.tiny.emulated15.") for n in names)
    assert [(p["strategy"], p["length"], p["batch"]) for p in data["points"]] == [
        (s, n, b) for s in STRATEGIES for b in (1, 2) for n in (32, 80)
    ]
    for p in data["points"]:
        assert set(p) == POINT and p["limit"] in ("prover", "link", "tee")
        assert p["measured"]["moved"] == p["measured"]["paper"]
    for r in data["results"]:
        if ".bytes_" in r["name"]:
            assert r["value"] == r["roofline"] and r["fraction"] == (1.0 if r["value"] else None)
    assert "prefill.tiny.emulated15.run-ahead_over_tsdp.n80.b2" in names
    assert "1 of 2 layers run, time scaled" in done.out and "writing random weights" in done.err
    table = [row for row in done.out.splitlines() if row.startswith(STRATEGIES)]
    assert len(table) == 20 and all(row.endswith("emulated") for row in table)
    lines = [json.loads(text) for text in saved.read_text().splitlines()]
    assert [r["name"] for r in lines] == names
    assert {"time", "cpu", "cores", "isa", "commit", "version", "shape", "layers"} <= set(lines[0])


def test_decode_with_a_limited_prover(cli: Cli, tmp_path: Path) -> None:
    kept = tmp_path / "model"
    arguments = (
        "bench", "decode", *QUICK, "--strategies", "veriattn,tsdp,full-tee", "--lengths", "300,600", "--steps", 2,
        "--prover-kv-tokens", 64, "--offload-ratio", 0.5, "--model-dir", kept,
    )  # fmt: skip
    first, second = cli(*arguments), cli(*arguments, "--attention-check", "transfer")
    assert first.code == second.code == 0, first.err + second.err
    assert "writing random weights" in first.err and "writing random weights" not in second.err
    data = first.json
    assert [p["strategy"] for p in data["points"]] == ["veriattn"] * 2 + ["tsdp"] * 2 + ["full-tee"] * 2
    assert all(p["measured"]["moved"] == p["measured"]["paper"] for p in data["points"])
    assert data["emulated_link"] is None and data["rates"]["link"]["to_prover"] is None
    assert cli("bench", "prefill", *QUICK, "--layers", 1, "--lengths", 32, "--model-dir", kept).code == 2


def test_a_sweep(cli: Cli) -> None:
    done = cli(
        "bench", "decode", *QUICK, "--strategies", "veriattn", "--lengths", 600, "--steps", 1, "--prover-kv-tokens", 0,
        "--offload-ratio", "0,.5,...,1,auto",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [p["ratio"] for p in done.json["points"]] == [0.0, 0.5, 1.0, "auto"]
    found = {r["name"]: r for r in done.json["results"]}
    bar = found["decode.tiny.veriattn.n600.b1.auto_over_best_fixed"]
    assert bar["bar"] == 1.1 and bar["met"] is (bar["value"] <= 1.1)
    assert "decode.tiny.veriattn.n600.b1.p0.5.tpot" in found


def test_kernels(in_process: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured has its own test (tests/native/test_bench.py); here it is what becomes of it."""
    lines = [line("a.kernel", 2.0, "GB/s", bar=1.0, met=True, roofline=4.0, higher=True)]
    monkeypatch.setattr(kernel_bench, "run", lambda seconds: lines if seconds == 3 else [])
    done = in_process("bench", "kernels", "--seconds", 3, "--json", "--save", tmp_path / "k.jsonl")
    # The first result; the memory of the verifier follows.
    assert done.code == 0 and done.json["results"][:1] == lines
    assert all(set(r) == FIELDS for r in done.json["results"])
    assert "a.kernel" in done.out.splitlines()[0] and "met" in done.out.splitlines()[0]
    saved = [json.loads(text) for text in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert [r["name"] for r in saved] == [r["name"] for r in done.json["results"]]


def test_a_picture(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = cli(
        "bench", "prefill", *QUICK, "--lengths", "32", "--repetitions", 1, "--strategies", "full-tee",
        "--plot", tmp_path / "picture",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [
    ("prefill", "--shape", "llama-9b"),
    ("prefill", "--shape", "tiny", "--layers", 3),
    ("prefill", "--shape", "tiny", "--lengths", "0"),
    ("prefill", "--shape", "tiny", "--lengths", "80,32"),
    ("prefill", "--shape", "tiny", "--lengths", "a"),
    ("prefill", "--shape", "tiny", "--lengths", "4096"),
    ("prefill", "--shape", "tiny", "--batch", "65"),
    ("prefill", "--shape", "tiny", "--batch", "1.5"),
    ("prefill", "--shape", "tiny", "--strategies", "fastest"),
    ("prefill", "--shape", "tiny", "--emulate-link", "fast"),
    ("prefill", "--shape", "tiny", "--threads", 0),
    ("prefill", "--shape", "tiny", "--device", "tpu"),
    ("prefill", "--shape", "tiny", "--prover-command", ""),
    ("prefill", "--shape", "tiny", "--offload-ratio", 0.5),
    ("decode", "--shape", "tiny", "--lengths", "64,65"),
    ("decode", "--shape", "tiny", "--lengths", "64", "--offload-ratio", "0,1"),
    ("decode", "--shape", "tiny", "--lengths", "64", "--offload-ratio", "0,2", "--prover-kv-tokens", 0),
    ("decode", "--shape", "tiny", "--lengths", "64", "--offload-ratio", "0,auto", "--prover-kv-tokens", 0),
    ("decode", "--shape", "tiny", "--lengths", "64", "--prover-kv-tokens", -1),
    ("kernels", "--seconds", -1),
])  # fmt: skip
def test_what_cannot_be_is_refused(arguments: tuple[object, ...], in_process: Cli) -> None:
    done = in_process("bench", *arguments, "--json")
    assert done.code == 2, done.err
    assert done.json["error"]["code"] == "usage"


@pytest.mark.parametrize(("text", "expected"), [
    ("1", [1.0]), ("1, 2", [1.0, 2.0]), ("0,.1,...,.4", [0.0, 0.1, 0.2, 0.3, 0.4]), ("0,2,...,6,9", [0, 2, 4, 6, 9]),
])  # fmt: skip
def test_lists(text: str, expected: list[float]) -> None:
    assert numbers(text, "--x") == expected


@pytest.mark.parametrize("text", ["", "1,,2", "...,2", "1,...,3", "1,2,...", "2,1,...,0", "x"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(UsageError):
        numbers(text, "--x")
