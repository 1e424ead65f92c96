"""Provers that lie, die or fall silent under a real server: who pays, who does not, and how it comes back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.server.harness import Running, Start, chat_body

FAST = "[prover]\nfirst_backoff_s = 0.01\nmax_backoff_s = 0.2\n"


class Stream(threading.Thread):
    """Reads a stream to its end, whatever that is."""

    def __init__(self, server: Running, **fields: Any) -> None:
        super().__init__()
        self._server, self._body = server, chat_body(stream=True, ignore_eos=True, **fields)
        self.objects: list[Any] = []
        self.status = 0
        self.text = ""
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._server.url + "/v1/chat/completions", json=self._body, timeout=60) as response:
            self.status = response.status_code
            if self.status != 200:
                response.read()
                self.objects.append(response.json())
                return
            for line in response.iter_lines():
                if line.startswith("data: "):
                    data = line[6:]
                    self.objects.append(data if data == "[DONE]" else json.loads(data))
                    self._note(self.objects[-1])

    def _note(self, event: Any) -> None:
        if isinstance(event, dict) and event.get("choices"):
            self.text += event["choices"][0]["delta"].get("content") or ""
            if len(self.objects) > 3:
                self.started.set()

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self.objects[-1]


def truth(server: Running, tokens: int) -> str:
    return str(server.chat(max_tokens=tokens, ignore_eos=True).json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("order", ["lie", "garbage"])
def test_a_caught_prover_ends_the_stream_with_an_error_and_is_replaced(start: Start, order: str) -> None:
    server = start(FAST)
    full = truth(server, 100)
    server.order("slow")
    stream = Stream(server, max_tokens=100)
    assert stream.started.wait(30)
    server.order(order)
    last = stream.result()
    assert last["error"]["type"] == "server_error"
    assert last["error"]["code"] == ("transcript_mismatch" if order == "garbage" else last["error"]["code"])
    if order == "lie":
        assert last["error"]["code"] in ("freivalds_mismatch", "attention_mismatch")
        assert "layers." in last["error"]["message"] or "lm_head" in last["error"]["message"]
    assert "[DONE]" not in stream.objects
    assert full.startswith(stream.text)  # what left before was the truth
    assert stream.text
    server.wait_ready(seconds=10)
    assert truth(server, 100) == full
    assert server.metric("veriattn:alarm") == 1
    assert server.metric("veriattn:rejects_total", code=last["error"]["code"]) == 1
    assert server.metric("veriattn:sessions_total") == 2
    assert server.get("/health").status_code == 200


def test_a_failure_before_the_first_token_has_a_status_and_no_receipt(start: Start) -> None:
    server = start(FAST)
    for stream in (False, True):
        server.order("lie")
        response = server.chat(stream=stream)
        assert response.status_code == 502
        assert response.json()["error"]["code"] in ("freivalds_mismatch", "attention_mismatch")
        assert "x-receipt-id" not in response.headers
        server.wait_ready(seconds=10)
    assert server.metric("veriattn:receipts_total") == 0


def test_a_prover_cannot_speak_to_users(start: Start) -> None:
    """What it says of itself is for the operator's log alone; to clients it would be unverified text."""
    server = start(FAST.replace("[prover]", "[prover]\nrequest_retries = 0"))
    for stream in (False, True):
        server.order("complain")
        response = server.chat(stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "prover_fault"
        assert "evil.example" not in response.text
        state = server.get("/ready")
        assert state.json()["last_fault"].startswith("prover_fault: ")
        assert "evil.example" not in state.text
        server.wait_ready(seconds=10)
    assert "evil.example" in server.wait_for("the prover failed")["fault"]


@pytest.mark.parametrize("how", ["kill", "die"])
def test_a_dead_prover_costs_nobody_anything(start: Start, how: str) -> None:
    server = start(FAST)
    full = truth(server, 100)
    server.order("slow")
    streams = [Stream(server, max_tokens=100) for _ in range(3)]
    for s in streams:
        assert s.started.wait(30)
    if how == "die":
        server.order("die")
    else:
        (pid,) = server.prover_pids()
        os.kill(pid, signal.SIGKILL)
        server.order("")
    for s in streams:
        assert s.result() == "[DONE]"
        assert s.text == full
    assert server.metric("veriattn:prover_faults_total", code="prover_unavailable") == 1
    assert server.metric("veriattn:request_retries_total") == 3
    assert server.metric("veriattn:alarm") == 0


def test_a_lie_about_one_request_ends_that_one_alone(start: Start) -> None:
    server = start(FAST)
    full = truth(server, 100)
    server.order("slow")
    streams = [Stream(server, max_tokens=100) for _ in range(3)]
    for s in streams:
        assert s.started.wait(30)
    server.order("lie")  # in the last element of a claim, which belongs to the last request of the step
    last = [s.result() for s in streams]
    assert sum(end == "[DONE]" for end in last) == 2
    assert (
        sum(end["error"]["code"] in ("freivalds_mismatch", "attention_mismatch") for end in last if end != "[DONE]")
        == 1
    )
    for s, end in zip(streams, last, strict=True):
        assert s.text == full if end == "[DONE]" else full.startswith(s.text)
    assert server.metric("veriattn:request_retries_total") == 2
    assert server.wait_for("the prover was caught")["jobs_concerned"] == 1


def test_the_demo_switch_harms_nobody_else(start: Start) -> None:
    server = start(FAST, "--demo")
    full = truth(server, 100)
    server.order("slow")
    others = [Stream(server, max_tokens=100) for _ in range(2)]
    for s in others:
        assert s.started.wait(30)
    liar = Stream(server, max_tokens=100, veriattn={"lie": True})
    assert "error" in liar.result()
    server.order("")
    for s in others:
        assert s.result() == "[DONE]"
        assert s.text == full


def test_a_silent_prover_is_replaced_after_the_step_timeout(start: Start) -> None:
    server = start(FAST + "[engine]\nstep_timeout_s = 3\n")
    full = truth(server, 20)
    server.order("hang")
    assert truth(server, 20) == full
    assert server.metric("veriattn:prover_faults_total", code="prover_timeout") == 1


def test_a_prover_that_ends_while_idle_is_noticed(start: Start) -> None:
    server = start(FAST)
    (pid,) = server.prover_pids()
    os.kill(pid, signal.SIGKILL)
    server.wait_for("the prover failed", seconds=10)
    server.wait_ready(seconds=10)
    assert server.prover_pids() != [pid]


def test_requests_that_were_not_in_the_step_are_finished(start: Start) -> None:
    # One at a time: the second waits while the first meets the lie.
    server = start(FAST + "[engine]\nmax_sequences = 1\n")
    full = truth(server, 100)
    server.order("slow")
    first = Stream(server, max_tokens=100)
    assert first.started.wait(30)
    others = [Stream(server, max_tokens=100) for _ in range(2)]
    server.wait_metric("vllm:num_requests_waiting", 2)
    server.order("lie")
    assert "error" in first.result()
    for s in others:
        assert s.result() == "[DONE]"
        assert s.text == full


def test_a_prover_that_keeps_lying_makes_the_server_unready_and_an_honest_one_ready_again(start: Start) -> None:
    server = start(FAST.replace("[prover]", "[prover]\nmax_restarts = 2"))
    server.order("lie-always")
    assert server.chat().status_code == 502
    state = server.wait_for("state", state="failing")
    assert state["level"] == "info"
    assert server.get("/ready").status_code == 503
    refused = server.chat()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "not_ready"
    assert "retry-after" in refused.headers
    assert server.get("/health").status_code == 200
    server.order("")
    server.wait_ready(seconds=10)
    assert server.chat().status_code == 200


def test_a_prover_that_lies_from_the_start_never_gets_the_server_ready(start: Start, tmp_path: Any) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "trigger").write_text("lie-always")
    server = start(FAST.replace("[prover]", "[prover]\nmax_restarts = 1"), wait=False)
    server.wait_for("state", state="failing", seconds=60)
    assert server.get("/ready").status_code == 503


def test_a_fault_of_the_provers_own_does_not_pass_for_the_canary(start: Start, tmp_path: Any) -> None:
    """Its first claim has a wrong size: the session ends before our alteration, of which nothing has been shown yet."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "trigger").write_text("garbage")
    server = start(FAST)
    assert server.wait_for("the prover was caught")["code"] == "transcript_mismatch"
    assert server.wait_for("the tamper canary was caught")["code"] in ("freivalds_mismatch", "attention_mismatch")
    assert server.wait_ready()["tamper_canary"] == "caught"


def test_faults_under_load_lose_and_mix_up_nothing(start: Start) -> None:
    server = start(
        FAST.replace("[prover]", "[prover]\nrequest_retries = 20\nmax_restarts = 20") + "[engine]\nmax_sequences = 4\n"
    )

    def ask(i: int) -> tuple[int, str]:
        response = server.chat(f"number {i}", max_tokens=60 + i, seed=i, temperature=1, ignore_eos=True)
        body = response.json()
        return response.status_code, "" if "error" in body else body["choices"][0]["message"]["content"]

    alone = {i: ask(i) for i in range(16)}
    with ThreadPoolExecutor(16) as pool:
        running = {i: pool.submit(ask, i) for i in range(16)}
        for order in ("die", "lie", "die", "lie"):
            time.sleep(0.25)
            server.order(order)
        answers = {i: f.result() for i, f in running.items()}
    for i, (status, text) in answers.items():
        assert status in (200, 502)
        assert text == ("" if status == 502 else alone[i][1])
    assert sum(status == 200 for status, _ in answers.values()) >= 16 - 2
    server.order("")
    server.wait_ready(seconds=10)
    assert ask(3) == alone[3]


def test_the_demo_switch_shows_a_rejection(start: Start) -> None:
    server = start(FAST, "--demo")
    assert server.get("/v1/models").json()["data"][0]["veriattn"]["demo"] is True
    stream = Stream(server, max_tokens=100, veriattn={"lie": True, "events": True})
    error = stream.result()["error"]
    assert error["code"] in ("freivalds_mismatch", "attention_mismatch")
    assert "layers." in error["message"]
    shown = [o for o in stream.objects if "veriattn" in o]
    assert 3 <= len(shown) <= 9
    server.wait_ready(seconds=10)
    assert server.chat().status_code == 200
