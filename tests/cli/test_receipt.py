"""`receipt verify`, `receipt replay` and `generate --receipt` as a user runs them."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Cli, Outcome

from veriattn.cli import main
from veriattn.client.bundle import Bundle

PROMPT = "abc"


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: nothing here starts another."""
    monkeypatch.setenv("VERIATTN_HOME", str(tmp_path / "home"))
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        signal.signal(signal.SIGTERM, before)
        return Outcome(code, *capfd.readouterr())

    return run


def generate(cli: Cli, tiny: Path, path: Path, *more: Any) -> Any:
    sampling = ("--temperature", 0.9, "--seed", 5, "--max-tokens", 16, "--strategy", "full-tee")
    return cli("generate", "-m", tiny, *sampling, "--receipt", path, *more, PROMPT)


def last_json(out: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return data


def test_a_receipt_of_a_local_generation(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = generate(cli, tiny, path, "--json")
    assert done.code == 0, done.err
    generated = last_json(done.out)
    assert "provider `test`" in done.err

    checked = cli("receipt", "verify", path, "-m", tiny, "--json")
    assert checked.code == 3
    report = last_json(checked.out)
    assert (report["verdict"], report["verified"], report["tee_type"]) == ("NOT VERIFIED", False, "test")
    states = {s["step"]: s["status"] for s in report["steps"]}
    skipped = {"quote.signature", "quote.report_data", "quote.measurements"}
    assert {n for n, s in states.items() if s == "SKIP"} == skipped
    assert {s for n, s in states.items() if n not in skipped} == {"PASS"}

    again = cli("receipt", "replay", path, "-m", tiny, "--json")
    assert again.code == 0, again.err
    replayed = last_json(again.out)
    assert (replayed["verdict"], replayed["output_tokens"]) == ("MATCH", len(generated["token_ids"]))

    people = cli("receipt", "replay", path, "-m", tiny)
    assert people.out.splitlines()[-1] == "MATCH"
    assert "ms per output token" in people.out
    people = cli("receipt", "verify", path, "-m", tiny)
    assert people.out.splitlines()[-1] == "NOT VERIFIED (12 passed, 0 failed, 3 skipped)"
    assert "provider `test`" in people.out


def test_lies_are_refused_with_the_reason(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert generate(cli, tiny, path, "--raw").code == 0
    bundle = Bundle.load(path)
    lies = {
        "receipt.response": replace(bundle, response=(bundle.response or b"") + b" "),
        "receipt.nonce": replace(bundle, client_nonce="0" * 64),
        "receipt.signature": replace(bundle, receipt={**bundle.receipt, "model": "x"}),
        "attestation.nonce": replace(bundle, attestation_nonce="0" * 64),
    }
    for step, lie in lies.items():
        lie.save(path)
        done = cli("receipt", "verify", path, "-m", tiny, "--json")
        assert done.code == 3
        report = last_json(done.out)
        assert report["verdict"] == "REFUSED"
        assert [s["step"] for s in report["steps"] if s["status"] == "FAIL"] == [step]
    lies["receipt.response"].save(path)
    done = cli("receipt", "replay", path, "-m", tiny)
    assert done.code == 3
    assert "FAIL  response" in done.out
    assert done.out.splitlines()[-1] == "MISMATCH"


def test_a_bare_receipt_with_the_rest_from_options(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert generate(cli, tiny, path).code == 0
    b = Bundle.load(path)
    files = {"receipt": json.dumps(b.receipt).encode(), "request": b.request, "response": b.response}
    files["report"] = json.dumps(b.attestation).encode()
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw or b"")
    options = ("--request", tmp_path / "request", "--response", tmp_path / "response")
    done = cli(
        "receipt", "verify", tmp_path / "receipt", *options, "--nonce", b.client_nonce, "-m", tiny,
        "--attestation", tmp_path / "report", "--attestation-nonce", b.attestation_nonce, "--json",
    )  # fmt: skip
    assert sum(s["status"] == "PASS" for s in last_json(done.out)["steps"]) == 12
    done = cli("receipt", "replay", tmp_path / "receipt", *options, "-m", tiny, "--json")
    assert (done.code, last_json(done.out)["verdict"]) == (0, "MATCH")
    done = cli("receipt", "replay", tmp_path / "receipt", "-m", tiny, "--json")
    assert (done.code, last_json(done.out)["error"]["code"]) == (2, "usage")
    done = cli("receipt", "verify", tmp_path / "receipt", "--json")
    report = last_json(done.out)
    assert (done.code, report["verdict"]) == (3, "NOT VERIFIED")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify", "none.json"), 5),
        (("verify", "http://127.0.0.1:1/v1"), 2),
        (("verify", "http://127.0.0.1:1/v1", "rcpt-1"), 3),
        (("verify", "file.json", "id"), 2),
        (("verify", "README.md"), 3),
        (("verify", "none.json", "--policy", "none"), 2),
        (("verify", "README.md", "--at", "yesterday"), 3),
        (("replay", "none.json", "-m", "none"), 5),
    ],
)
def test_misuse(cli: Cli, arguments: tuple[str, ...], code: int) -> None:
    done = cli("receipt", *arguments, "--json")
    assert done.code == code
    assert last_json(done.out)["error"]["exit_code"] == code


def test_one_receipt_is_for_one_prompt(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("abc\n")
    done = cli("generate", "-m", tiny, "--prompts-file", prompts, "--receipt", tmp_path / "r.json", "--json")
    assert (done.code, last_json(done.out)["error"]["code"]) == (2, "usage")
    assert not (tmp_path / "r.json").exists()
