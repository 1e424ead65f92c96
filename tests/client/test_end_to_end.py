"""A real server process with a verifier, a prover and TLS of its own; the SDK in front; receipts VERIFIED and replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.attest.synthetic_tdx import synthetic_image
from tests.helpers import make_model

from veriattn.attest.policy import Policy, TdxPolicy
from veriattn.attest.quotes import TdxVerifier, production_verifiers
from veriattn.attest.verify import ReceiptVerifier
from veriattn.cli import main
from veriattn.client import VerifiedOpenAI
from veriattn.client.replay import Replayer, ReplayModel
from veriattn.errors import AttestationError

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
ROOT = Path(__file__).parents[2]
POLICY = Policy(tdx=TdxPolicy((synthetic_image(),)))
MESSAGES: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": "tell me"}]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 24}


@dataclass(frozen=True)
class Served:
    url: str
    folder: Path
    model: Path
    digest: str

    @property
    def verifier(self) -> ReceiptVerifier:
        tdx = TdxPolicy((synthetic_image(),))
        return ReceiptVerifier({"tdx": TdxVerifier(tdx, (self.folder / "root.der").read_bytes())})


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[VerifiedOpenAI]:
    with VerifiedOpenAI.attested(
        served.url, "anonymous", policy=POLICY, verifier=served.verifier, model_digests=[served.digest], max_retries=0
    ) as connected:
        yield connected


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("attested")
    digest = make_model(folder / "tiny", vocab_size=260)
    (folder / "serve.toml").write_text("port = 0\nserved_name = 'tiny'\n[tls]\nephemeral = true\n")
    script = Path(__file__).with_name("attested_server.py")
    command = [
        sys.executable,
        str(script),
        str(folder),
        "-m",
        str(folder / "tiny"),
        "--config",
        str(folder / "serve.toml"),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, env=environment, text=True)
    log: list[str] = []
    port: list[int] = []

    def read() -> None:
        for line in process.stderr or ():
            log.append(line)
            if '"listening"' in line:
                port.append(json.loads(line)["address"][1])

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + 90
    while not port or not any('"state": "ready"' in line for line in list(log)):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError("the server did not start:\n" + "".join(log[-20:]))
        time.sleep(0.05)
    yield Served(f"https://127.0.0.1:{port[0]}/v1", folder, folder / "tiny", digest)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "max_tokens": 16},
        SAMPLED,
        {**SAMPLED, "seed": 11, "n": 3},
        {**SAMPLED, "stream": True, "stream_options": {"include_usage": True}},
        {**SAMPLED, "seed": 4, "presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"9": 3, "12": -2.5}},
        {**SAMPLED, "stop": ["a", "e"], "logprobs": True, "top_logprobs": 2},
    ],
)
def test_chat_is_verified_and_replayed(served: Served, client: VerifiedOpenAI, fields: dict[str, Any]) -> None:
    answer = client.openai.chat.completions.create(model="tiny", messages=MESSAGES, **fields)
    if fields.get("stream"):
        list(answer)
    v = client.verify()
    v.require()
    assert len(v.steps) == 16
    bundle = client.bundle()
    assert bundle.request is not None
    assert bundle.response is not None
    found = Replayer(ReplayModel(served.model)).replay(bundle.receipt, bundle.request, bundle.response)
    found.require()
    # The same bundle with one letter of the answer changed is neither verified nor replayed.
    changed = bundle.response.replace(b'"index"', b'"Index"', 1)
    assert not Replayer(ReplayModel(served.model)).replay(bundle.receipt, bundle.request, changed).matches


def test_completions_with_several_prompts(served: Served, client: VerifiedOpenAI) -> None:
    answer = client.openai.completions.create(model="tiny", prompt=["abc", "xyz"], n=2, **SAMPLED)
    client.verify(answer).require()
    bundle = client.bundle(answer)
    assert len(answer.choices) == 4
    assert bundle.request is not None
    assert bundle.response is not None
    found = Replayer(ReplayModel(served.model)).replay(bundle.receipt, bundle.request, bundle.response)
    found.require()
    assert found.output_tokens == answer.usage.completion_tokens


def test_the_command_line_against_the_server(
    served: Served,
    client: VerifiedOpenAI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    client.openai.chat.completions.create(model="tiny", messages=MESSAGES, **SAMPLED)
    exchange = client.last
    assert exchange is not None
    (tmp_path / "request").write_bytes(exchange.request)
    (tmp_path / "response").write_bytes(exchange.response)
    policy = {"format": "veriattn-policy/1", "tdx": {"images": [{"name": "image", **synthetic_image().required()}]}}
    (tmp_path / "policy").write_text(json.dumps(policy))
    arguments = [
        "receipt", "verify", served.url, str(exchange.receipt_id), "--attested-tls", "--nonce", exchange.nonce,
        "--request", str(tmp_path / "request"), "--response", str(tmp_path / "response"), "--json",
        "--policy", str(tmp_path / "policy"), "-m", str(served.model), "--save", str(tmp_path / "bundle"),
    ]  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    # Under Intel's root the made-up quote does not vouch for the TLS key, and nothing more is asked.
    assert main(arguments) == 3
    assert "quote.signature" in json.loads(capfd.readouterr().out)["error"]["message"]
    root = (served.folder / "root.der").read_bytes()

    def verifiers(policy: Policy) -> dict[str, Any]:
        return {} if policy.tdx is None else {"tdx": TdxVerifier(policy.tdx, root)}

    monkeypatch.setattr("veriattn.attest.quotes.production_verifiers", verifiers)
    assert main(arguments) == 0
    assert json.loads(capfd.readouterr().out)["verdict"] == "VERIFIED"
    offline = ["--policy", str(tmp_path / "policy"), "-m", str(served.model)]
    assert main(["receipt", "verify", str(tmp_path / "bundle"), *offline]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "VERIFIED (15 passed, 0 failed, 0 skipped)"
    assert main(["receipt", "replay", str(tmp_path / "bundle"), "-m", str(served.model)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "MATCH"
    signal.signal(signal.SIGTERM, before)


def test_production_verifiers_refuse_this_server(served: Served) -> None:
    with pytest.raises(AttestationError, match=r"quote\.signature"):
        VerifiedOpenAI.attested(served.url, "key", policy=POLICY)
    assert set(production_verifiers(POLICY)) == {"tdx"}
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(served.url + "/models", timeout=10)  # noqa: S310 - https
