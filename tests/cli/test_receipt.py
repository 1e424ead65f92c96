"""`receipt verify`, `receipt replay` and `generate --receipt` as a user runs them."""

from __future__ import annotations

import datetime
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.attest.conftest import MODEL_DIGEST, event
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, SyntheticTdxProvider, synthetic_image
from tests.cli.conftest import Cli, Outcome

from veriattn.attest.policy import Policy
from veriattn.attest.quotes import TdxVerifier
from veriattn.attest.service import ReceiptService
from veriattn.cli import main
from veriattn.client.bundle import Bundle

PROMPT = "abc"
VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"


@pytest.fixture(scope="module")
def platform() -> SyntheticTdx:
    return SyntheticTdx()


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


def attested(tmp_path: Path, platform: SyntheticTdx, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A bundle of a server on a made-up platform, its collateral, a policy; and verifiers under the made-up root."""

    def verifiers(policy: Policy) -> dict[str, Any]:
        return {} if policy.tdx is None else {"tdx": TdxVerifier(policy.tdx, platform.root_der)}

    monkeypatch.setattr("veriattn.attest.quotes.production_verifiers", verifiers)
    service = ReceiptService(SyntheticTdxProvider(platform), clock=lambda: float(NOW))
    nonce, attestation_nonce = "1" * 64, "2" * 64
    issued = service.issue(b"{}", b"{}", event(client_nonce=nonce), "key", "chatcmpl-1")
    report = service.attestation(attestation_nonce)
    del report["attestation"]["evidence"]["collateral"]
    bundle, collateral, policy = (tmp_path / n for n in ("bundle.json", "collateral.json", "policy.json"))
    Bundle(issued, report, b"{}", b"{}", nonce, attestation_nonce).save(bundle)
    collateral.write_text(platform.collateral)
    image = {"name": "image", **synthetic_image().required()}
    tdx = {"images": [image]}
    policy.write_text(json.dumps({"format": "veriattn-policy/1", "tdx": tdx, "model_digests": [MODEL_DIGEST]}))
    return bundle, collateral, policy


def test_verified_exits_0_and_nothing_less_does(
    cli: Cli, tmp_path: Path, platform: SyntheticTdx, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, collateral, policy = attested(tmp_path, platform, monkeypatch)
    full = ("--policy", policy, "--collateral", collateral, "--at", NOW)
    done = cli("receipt", "verify", bundle, *full)
    assert done.code == 0, done.out
    assert done.out.splitlines()[-1] == "VERIFIED (15 passed, 0 failed, 0 skipped)"
    report = last_json(cli("receipt", "verify", bundle, *full, "--json").out)
    assert (report["verified"], report["image"], report["tee_type"]) == (True, "image", "tdx")
    at = datetime.datetime.fromtimestamp(NOW, datetime.UTC).isoformat()
    assert cli("receipt", "verify", bundle, *full[:4], "--at", at).code == 0

    for less, skipped in (
        ((*full[2:], "--model-digest", MODEL_DIGEST), "quote.signature"),
        ((*full[:2], *full[4:]), "quote.signature"),
    ):
        done = cli("receipt", "verify", bundle, *less, "--json")
        assert done.code == 3
        report = last_json(done.out)
        assert report["verdict"] == "NOT VERIFIED"
        assert skipped in [s["step"] for s in report["steps"] if s["status"] == "SKIP"]
    done = cli("receipt", "verify", bundle, *full[:4], "--at", NOW + 20 * 365 * 86400, "--json")
    assert (done.code, last_json(done.out)["verdict"]) == (3, "REFUSED")


def test_the_same_bundle_under_intels_root_is_refused(cli: Cli, tmp_path: Path, platform: SyntheticTdx) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bundle, collateral, policy = attested(tmp_path, platform, patch)
    done = cli("receipt", "verify", bundle, "--policy", policy, "--collateral", collateral, "--at", NOW, "--json")
    failed = [s["step"] for s in last_json(done.out)["steps"] if s["status"] == "FAIL"]
    assert (done.code, failed) == (3, ["quote.signature"])


def test_a_real_quote_of_somebody_else_does_not_vouch_for_these_keys(
    cli: Cli, tmp_path: Path, platform: SyntheticTdx
) -> None:
    """The real quote's signatures hold at its time, offline; it is over other keys and another image."""
    with pytest.MonkeyPatch.context() as patch:
        path, _, policy = attested(tmp_path, platform, patch)
    bundle = Bundle.load(path)
    assert bundle.attestation is not None
    bundle.attestation["attestation"]["evidence"]["quote"] = (VECTORS / "quote.bin").read_bytes().hex()
    bundle.save(path)
    options = ("--policy", policy, "--collateral", VECTORS / "collateral.json", "--json")
    report = last_json(cli("receipt", "verify", path, *options, "--at", 1751673600).out)
    states = {s["step"]: s["status"] for s in report["steps"]}
    assert states["quote.signature"] == "PASS"
    assert (states["quote.report_data"], states["quote.measurements"]) == ("FAIL", "FAIL")
    now = last_json(cli("receipt", "verify", path, *options).out)
    assert {s["step"]: s["status"] for s in now["steps"]}["quote.signature"] == "FAIL"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify", "none.json"), 5),
        (("verify", "http://127.0.0.1:1/v1"), 2),
        (("verify", "http://127.0.0.1:1/v1", "rcpt-1"), 3),
        (("verify", "file.json", "id"), 2),
        (("verify", "README.md"), 3),
        (("verify", "none.json", "--policy", "none"), 2),
        (("verify", "README.md", "--at", "yesterday"), 2),
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
