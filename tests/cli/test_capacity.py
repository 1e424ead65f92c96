"""`generate` where the prover cannot hold the cache: the same answer, where keys were, limits that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Cli

PROMPT = "hello there " * 60
WHOLE: list[int] = []  # the answer without any prover, computed once
BASE = ("--raw", PROMPT, "--max-tokens", 8, "--json", "--prefill-chunk", 256)


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn", "tsdp"])
@pytest.mark.parametrize("ratio", ["0", "1", None])
def test_the_same_answer_and_where_its_keys_were(cli: Cli, tiny: Path, strategy: str, ratio: str | None) -> None:
    if not WHOLE:
        WHOLE.extend(cli("generate", "-m", tiny, *BASE, "--strategy", "full-tee").json["token_ids"])
    options = ("--prover-kv-tokens", 50, *(() if ratio is None else ("--offload-ratio", ratio)))
    got = cli("generate", "-m", tiny, *BASE, "--strategy", strategy, *options).json
    assert got["token_ids"] == WHOLE and got["verified"] is True
    kv = got["kv"]
    assert set(kv) == {
        "prover_tokens", "streamed_tokens", "tee_tokens", "offload_ratio", "offload_ratios", "offload_trials", "tee_bytes"
    }  # fmt: skip
    assert kv["prover_tokens"] > 0 and kv["tee_bytes"] > 0
    if strategy == "tsdp":
        assert kv["streamed_tokens"] > 0 and kv["tee_tokens"] == 0
        return
    assert kv["tee_tokens"] > 0
    assert (kv["streamed_tokens"] > 0) == (ratio != "0")
    # Three chunks, the first in two parts, and seven steps; where nothing is beyond the limit there is no decision.
    assert len(kv["offload_ratios"]) == 3 + 7 and kv["offload_ratio"] == kv["offload_ratios"][-1]
    assert all(0 <= p <= 1 for p in kv["offload_ratios"])
    if ratio is not None:
        assert set(kv["offload_ratios"]) == {float(ratio)} and kv["offload_trials"] == 0


def test_decisions_in_the_trace(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    cli("generate", "-m", tiny, *BASE, "--prover-kv-tokens", 0, "--trace", trace)
    events = json.loads(trace.read_text())["traceEvents"]
    decisions = [e["name"] for e in events if "offload ratio" in e["name"] and e["dur"] == 0]
    assert len(decisions) == 3 + 7


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn", "tsdp", "full-tee"])
def test_too_little_memory(cli: Cli, tiny: Path, strategy: str) -> None:
    """A clear error before it is taken, with what there was until then; a limit that suffices is no error."""
    capacity = () if strategy == "full-tee" else ("--prover-kv-tokens", 50)
    done = cli("generate", "-m", tiny, *BASE, "--strategy", strategy, *capacity, "--tee-memory", "100K")
    assert done.code == 2
    assert done.json["error"]["code"] == "config" and "102400" in done.json["error"]["message"]
    assert "--tee-memory" in done.json["error"]["hint"] and "hint:" in done.err
    got = cli("generate", "-m", tiny, *BASE, "--strategy", strategy, *capacity, "--tee-memory", "1M")
    assert got.code == 0 and 0 < got.json["kv"]["tee_bytes"] <= 1 << 20


@pytest.mark.parametrize("strategy", ["full-tee", "dangerous-unverified"])
def test_a_capacity_without_a_place_for_the_rest(cli: Cli, tiny: Path, strategy: str) -> None:
    done = cli("generate", "-m", tiny, *BASE, "--strategy", strategy, "--prover-kv-tokens", 5)
    assert done.code == 2 and "capacity" in done.err


@pytest.mark.parametrize("size", ["", "12T", "-1"])
def test_sizes(cli: Cli, tiny: Path, size: str) -> None:
    done = cli("generate", "-m", tiny, *BASE, "--tee-memory", size)
    assert done.code == 2 and "--tee-memory" in done.err


@pytest.mark.parametrize("ratio", ["-0.1", "nan"])
def test_ratios(cli: Cli, tiny: Path, ratio: str) -> None:
    assert cli("generate", "-m", tiny, *BASE, "--prover-kv-tokens", 5, "--offload-ratio", ratio).code == 2
