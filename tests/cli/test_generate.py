"""`generate` end to end: real processes, the fields of its JSON, strategies, faults, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Cli, environment
from tests.helpers import LocalModel

STRATEGIES = ("run-ahead", "veriattn", "tsdp", "full-tee", "dangerous-unverified")
PROMPT = "hello there"


def expected_ids(tiny: Path, prompt: str, count: int) -> list[int]:
    """The canonical answer, by the NumPy reference alone."""
    alphabet = {c: i + 4 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz \n")}
    return LocalModel.open(tiny).greedy([alphabet[c] for c in prompt], count)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_reference_tokens(cli: Cli, tiny: Path, strategy: str) -> None:
    done = cli("generate", "-m", tiny, "--raw", PROMPT, "--max-tokens", 6, "--strategy", strategy, "--json")
    assert done.code == 0, done.err
    assert done.json["token_ids"] == expected_ids(tiny, PROMPT, 6)
    assert done.json["strategy"] == strategy
    assert done.json["finish_reason"] == "length"


def test_fields(cli: Cli, tiny: Path) -> None:
    got = cli("generate", "-m", tiny, "--raw", PROMPT, "--max-tokens", 4, "--json", "--logprobs", 2).json
    assert got["verified"] is True and got["guarantee"] == "exact"
    assert got["model"]["path"] == str(tiny) and len(got["model"]["digest"]) == 64
    assert got["prover"]["pid"] > 0 and got["prover"]["device"] == "cpu"
    rows = len(PROMPT) + 3
    tee_bytes = got["kv"].pop("tee_bytes")
    assert got["kv"] == {"prover_tokens": rows, "streamed_tokens": 0, "tee_tokens": 0, "offload_ratio": 0.0}
    assert tee_bytes > 0
    # Two layers of four linears on every row, and lm_head on the rows that were sampled from.
    assert got["checks"]["linear_rows"] == 2 * 4 * rows + 4
    assert got["checks"]["attention_rows"] == 2 * 4 * rows
    assert got["soundness_bits"] >= 98
    assert got["kv_shield"] == "off"
    assert got["bytes"]["from_prover"] > got["bytes"]["to_prover"] > 0
    assert set(got["timing"]) >= {
        "ttft_s", "tpot_s", "prefill_tokens_per_s", "decode_tokens_per_s", "verify_cpu_s", "prover_wait_s"
    }  # fmt: skip
    assert [entry["token_id"] for entry in got["logprobs"]] == got["token_ids"]
    assert all(entry["top"][0]["token_id"] == entry["token_id"] for entry in got["logprobs"])


def test_full_tee_has_no_prover(cli: Cli, tiny: Path) -> None:
    got = cli("generate", "-m", tiny, "--raw", PROMPT, "--max-tokens", 2, "--strategy", "full-tee", "--json").json
    assert got["prover"] == {"pid": None, "device": None}
    assert got["soundness_bits"] is None
    assert got["guarantee"] == "trusted-compute"
    assert got["bytes"] == {"to_prover": 0, "from_prover": 0}


def test_unverified_says_so_on_every_line(cli: Cli, tiny: Path) -> None:
    arguments = ("generate", "-m", tiny, "--raw", "one\ntwo", "--max-tokens", 40, "--strategy", "dangerous-unverified")
    done = cli(*arguments)
    lines = done.out.splitlines() + [line for line in done.err.splitlines() if "tokens" in line]
    assert lines and all(line.startswith("[UNVERIFIED] ") for line in lines)
    got = cli(*arguments, "--json").json
    assert got["verified"] is False and got["guarantee"] == "none" and got["soundness_bits"] is None


def test_text_is_the_same_with_and_without_json(cli: Cli, tiny: Path) -> None:
    plain = cli("generate", "-m", tiny, PROMPT, "--max-tokens", 12, "--seed", 5, "--temperature", 0.9)
    with_json = cli("generate", "-m", tiny, PROMPT, "--max-tokens", 12, "--seed", 5, "--temperature", 0.9, "--json")
    assert plain.code == with_json.code == 0
    text = with_json.json["text"]
    assert plain.out == text + ("" if text.endswith("\n") or not text else "\n")
    assert with_json.out.count("\n") == 1


def test_prompts_file(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('hello there\n\n"one\\ntwo"\nx\n', encoding="utf-8")
    done = cli("generate", "-m", tiny, "--raw", "--prompts-file", file, "--max-tokens", 3, "--json")
    results = done.json["results"]
    assert [r["token_ids"] for r in results] == [expected_ids(tiny, p, 3) for p in ("hello there", "one\ntwo", "x")]
    assert done.json["verified"] is True and "text" not in done.json
    shown = cli("generate", "-m", tiny, "--raw", "--prompts-file", file, "--max-tokens", 3).out
    assert [line for line in shown.splitlines() if line.startswith("---")] == ["--- 1", "--- 2", "--- 3"]


def test_standard_input(cli: Cli, tiny: Path) -> None:
    done = cli("generate", "-m", tiny, "--raw", "-", "--max-tokens", 3, "--json", stdin="hello there")
    assert done.json["token_ids"] == expected_ids(tiny, "hello there", 3)


def test_stop_string(cli: Cli, tiny: Path) -> None:
    whole = cli("generate", "-m", tiny, "--raw", PROMPT, "--max-tokens", 12, "--json").json["text"]
    stop = whole[4:6]
    got = cli("generate", "-m", tiny, "--raw", PROMPT, "--max-tokens", 12, "--stop", stop, "--json").json
    assert got["text"] == whole[: whole.index(stop)]
    assert got["finish_reason"] == "stop"


@pytest.mark.parametrize("at", [1, 4])
def test_a_lie_ends_it(cli: Cli, tiny: Path, odd_prover: Callable[[str], str], at: int) -> None:
    base = ("generate", "-m", tiny, "--raw", PROMPT, "--max-tokens", 8, "--json", "--prover-command")
    done = cli(*base, odd_prover(f"lie {at}"))
    assert done.code == 3
    assert done.json["error"]["code"] == "freivalds_mismatch"
    assert "error[freivalds_mismatch]" in done.err
    # What came before the lie had been checked, and is all that was shown.
    assert done.json["verified"] is False
    assert done.json["partial"]["verified"] is True
    assert done.json["partial"]["token_ids"] == expected_ids(tiny, PROMPT, 8)[: at - 1]
    assert cli(*base, odd_prover("lie 1000")).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(tiny: Path, tmp_path: Path, odd_prover: Callable[[str], str], number: signal.Signals) -> None:
    command = ["generate", "-m", str(tiny), "--raw", PROMPT, "--max-tokens", "900", "--json"]
    begun = tmp_path / "begun"
    # What a shell starts behind "&" ignores SIGINT, and so would its children.
    heed = ("env", "--default-signal=INT")
    process = subprocess.Popen(
        [*heed, sys.executable, "-m", "veriattn", *command, "--prover-command", odd_prover(f"slow {begun}")],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not begun.exists():  # in the fifth step, with what the first gave released, and far from the 900th
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    got: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert process.returncode == 130
    assert got["error"]["code"] == "interrupted"
    assert got["verified"] is True and got["finish_reason"] == "cancelled"
    count = len(got["token_ids"])
    assert 0 < count < 900
    assert got["token_ids"] == expected_ids(tiny, PROMPT, count)
    with pytest.raises(ProcessLookupError):
        os.kill(got["prover"]["pid"], 0)
