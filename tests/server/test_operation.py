"""Keys, quotas, limits, draining, TLS and settings of a running server."""

from __future__ import annotations

import hashlib
import json
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from tests.server.harness import ROOT, Start, chat_body

from veriattn.errors import ConfigError
from veriattn.server.auth import new_key, read_keys


def entry(name: str, digest: str, **fields: Any) -> str:
    lines = ["[[key]]", f'id = "{name}"', f'sha256 = "{digest}"', *(f"{k} = {v}" for k, v in fields.items())]
    return "\n".join(lines) + "\n"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_quotas_rotation_and_whose_receipt_it_is(start: Start, tmp_path: Path) -> None:
    (alice, alice_hash), (bob, bob_hash), (late, late_hash), (next_key, next_hash) = (new_key() for _ in range(4))
    keys = tmp_path / "keys.toml"
    text = entry("alice", alice_hash) + entry("bob", bob_hash, requests_per_minute=2)
    text += entry("carol", late_hash, not_after="2020-01-01T00:00:00Z")
    keys.write_text(text)
    server = start(f"keys_file = {json.dumps(str(keys))}\n")
    assert server.chat().status_code == 401
    for wrong in ("va-wrong", late, alice_hash, ""):
        response = server.chat(headers=bearer(wrong) if wrong else {"Authorization": "Basic x"})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.get("/v1/models").status_code == 401
    assert server.get("/v1/aci/attestation?nonce=" + "0" * 64).status_code == 200  # before any key is shown

    answer = server.chat(headers=bearer(alice))
    assert answer.status_code == 200
    receipt = "/v1/aci/receipts/" + answer.headers["x-receipt-id"]
    # Whoever has a key may use any name for this server, and be any page.
    for also in ({}, {"Host": "api.example"}, {"Origin": "https://b.example"}):
        assert server.get(receipt, headers={**bearer(alice), **also}).status_code == 200
    for other in (bearer(bob), {}):
        assert server.get(receipt, headers=other).status_code == (404 if other else 401)
    assert server.get("/v1/aci/receipts/" + answer.json()["id"], headers=bearer(bob)).status_code == 404

    # A machine so slow that a request is earned back in between gets a few more.
    statuses = [server.chat(headers=bearer(bob)).status_code for _ in range(6)]
    assert statuses[:2] == [200, 200]
    assert 429 in statuses
    refused = server.chat(headers=bearer(bob))
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60

    keys.write_text(entry("alice", alice_hash, not_after="2020-01-01T00:00:00Z") + entry("alice", next_hash))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("API keys read again")
    assert server.chat(headers=bearer(alice)).status_code == 401
    assert server.get(receipt, headers=bearer(next_key)).status_code == 200  # the same caller, with a new key
    keys.write_text("[[key]]\nid = 3\n")
    server.process.send_signal(signal.SIGHUP)
    assert server.wait_for(f"{keys}, key 0: id must be a name other than 'anonymous'")["level"] == "error"
    assert server.chat(headers=bearer(next_key)).status_code == 200  # a broken file changes nothing
    log = "\n".join(server.raw)
    assert not any(k in log for k in (alice, bob, late, next_key))


def test_a_keys_file_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    """A prover runs under a user of its own: a line of its own in there would be a key."""
    path = tmp_path / "keys.toml"
    path.write_text(entry("a", new_key()[1]))
    for mode in (0o600, 0o644, 0o664):
        path.chmod(mode)
        assert [e.id for e in read_keys(path)] == ["a"]
    path.chmod(0o646)
    with pytest.raises(ConfigError, match="can be written by others"):
        read_keys(path)


def test_a_daily_quota_of_tokens(start: Start, tmp_path: Path) -> None:
    key, digest = new_key()
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("a", digest, tokens_per_day=30))
    server = start(f"keys_file = {json.dumps(str(keys))}\n")
    statuses = [server.chat(headers=bearer(key)).status_code for _ in range(4)]
    assert statuses[0] == 200
    assert statuses[-1] == 429


def test_a_quota_of_requests_at_a_time_and_turns_between_keys(start: Start, tmp_path: Path) -> None:
    (alice, alice_hash), (bob, bob_hash) = new_key(), new_key()
    keys = tmp_path / "keys.toml"
    keys.write_text(entry("alice", alice_hash, concurrent_requests=3) + entry("bob", bob_hash))
    server = start(f"keys_file = {json.dumps(str(keys))}\n[engine]\nmax_sequences = 1\n")
    server.order("slow")
    ended: list[str] = []

    def ask(name: str, key: str) -> None:
        assert server.chat(max_tokens=100, ignore_eos=True, headers=bearer(key)).status_code == 200
        ended.append(name)

    threads = [threading.Thread(target=ask, args=("alice", alice)) for _ in range(3)]
    for i, thread in enumerate(threads):
        thread.start()
        server.wait_metric("vllm:num_requests_running", 1)
        server.wait_metric("vllm:num_requests_waiting", i)
    refused = server.chat(headers=bearer(alice))
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    threads.append(threading.Thread(target=ask, args=("bob", bob)))
    threads[-1].start()
    server.wait_metric("vllm:num_requests_waiting", 3)
    server.order("")
    for thread in threads:
        thread.join()
    assert ended == ["alice", "bob", "alice", "alice"]
    assert server.chat(headers=bearer(alice)).status_code == 200


def test_a_full_queue_says_when_to_come_back(start: Start) -> None:
    server = start("[limits]\nqueue_length = 1\n[engine]\nmax_sequences = 1\n")
    server.order("slow")
    body = chat_body(max_tokens=200, ignore_eos=True)
    threads = [
        threading.Thread(target=lambda: httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120))
        for _ in range(2)
    ]
    threads[0].start()
    server.wait_metric("vllm:num_requests_running", 1)
    threads[1].start()
    server.wait_metric("vllm:num_requests_waiting", 1)
    refused = server.chat()
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    server.order("")
    for t in threads:
        t.join()
    assert server.chat().status_code == 200


def test_what_never_fits_is_413_and_slow_is_504(start: Start) -> None:
    server = start("[limits]\ntokens_in_flight = 100\nrequest_timeout_s = 2\n")
    large = server.chat(max_tokens=200)
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "request_too_large"
    server.order("slow")  # 50 tokens of nine claims each: nine seconds at least
    slow = server.chat(max_tokens=50, ignore_eos=True)
    assert slow.status_code == 504
    assert slow.json()["error"]["code"] == "request_timeout"
    streamed = server.chat(max_tokens=50, ignore_eos=True, stream=True)
    assert "[DONE]" not in streamed.text
    assert "request_timeout" in streamed.text


def test_sigterm_finishes_what_has_begun(start: Start) -> None:
    server = start()
    server.order("slow")
    body = chat_body(max_tokens=100, ignore_eos=True, stream=True)
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        server.order("")
        rest = list(lines)
    assert "data: [DONE]" in rest[-2:]
    assert sum(line.startswith("data: {") for line in rest) > 20  # most of it came after the signal
    assert server.process.wait(20) == 0
    assert not any("Traceback" in line for line in server.raw)


def test_a_drain_that_takes_too_long_ends_with_an_error_event(start: Start) -> None:
    server = start("[limits]\ndrain_timeout_s = 0.2\n[engine]\nmax_sequences = 2\n")
    server.order("slow")  # three minutes, if it were let
    body = chat_body(max_tokens=980, ignore_eos=True, stream=True)
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1][6:])["error"]["type"] == "server_error"
    assert server.process.wait(20) == 0


def test_tls_with_a_key_that_the_attestation_names(start: Start) -> None:
    server = start("[tls]\nephemeral = true\n")
    pem = ssl.get_server_certificate(("127.0.0.1", server.port))
    public = x509.load_pem_x509_certificate(pem.encode()).public_key()
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    report = server.get("/v1/aci/attestation?nonce=" + "1" * 64).json()
    named = report["attestation"]["workload_keyset"]["tls_public_keys"]
    assert [k["spki_sha256"] for k in named] == [hashlib.sha256(spki).hexdigest()]
    assert server.chat().status_code == 200


def test_a_page_in_a_browser_of_this_machine_gets_nothing_but_from_the_origins_named(start: Start) -> None:
    """A name of its own that a page lets point here, or a request that it may send but not read."""
    own = start('cors_origins = ["https://app.example"]\n')
    refused = [
        {"Host": f"evil.example:{own.port}"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "["},
        {"Host": "10.0.0.1"},
    ]
    refused += [{"Origin": o} for o in ("https://b.example", "null", "http://localhost.evil.example", "")]
    for headers in refused:
        for answer in (own.chat(headers=headers), own.get("/metrics", headers=headers), own.get("/", headers=headers)):
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "not_local"
            assert "access-control-allow-origin" not in answer.headers
    taken = [{"Host": "localhost"}, {"Host": f"[::1]:{own.port}"}, {"Host": f"LOCALHOST:{own.port}"}]
    taken += [{"Origin": own.url}, {"Origin": "https://app.example"}, {}]
    for headers in taken:
        assert own.chat(headers=headers).status_code == 200
    allowed = own.get("/health", headers={"Origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"


def test_full_tee_serves_without_a_prover(start: Start, server: Any) -> None:
    own = start("", "--strategy", "full-tee", faulty=False)
    ready = own.wait_ready()
    assert ready["tamper_canary"] == "not-applicable"
    assert ready["guarantee"] == "trusted-compute"
    assert own.chat().json()["choices"] == server.chat().json()["choices"]
    receipt = own.get("/v1/aci/receipts/" + own.chat().headers["x-receipt-id"]).json()
    event = next(e for e in receipt["event_log"] if e["type"] == "gpu.verified")
    assert event["result"] == "trusted-compute"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-m", "veriattn", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def test_settings_that_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[limits]\nqueue_lenght = 3\n")
    result = command("serve", "-m", str(tiny_path), "--config", str(path))
    assert result.returncode == 2
    assert "error[config]: unknown setting limits.queue_lenght" in result.stderr
    path.write_text("[engine]\nstrategy = 'full-tee'\nprover_address = 'tcp://127.0.0.1:9'\n")
    result = command("serve", "-m", str(tiny_path), "--config", str(path))
    assert result.returncode == 2 and "full-tee has no prover" in result.stderr
    assert command("serve", "-m", str(tiny_path), "--host", "192.0.2.1").returncode == 2
    assert command("serve", "-m", str(tiny_path), "--strategy", "dangerous-unverified").returncode == 2
    assert command("serve", "-m", str(tiny_path), "--digest", "0" * 64).returncode == 5
    assert command("serve", "-m", str(tmp_path / "nothing")).returncode == 5


def test_a_port_that_is_taken(start: Start, tiny_path: Path) -> None:
    server = start()
    assert command("serve", "-m", str(tiny_path), "--port", str(server.port)).returncode != 0


def test_api_key_prints_the_key_once_and_its_entry() -> None:
    result = command("api-key", "alice", "--tokens-per-day", "5")
    assert result.returncode == 0
    key = result.stdout.strip()
    assert f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"' in result.stderr
    assert "tokens_per_day = 5" in result.stderr
    assert key not in result.stderr
