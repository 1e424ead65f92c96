"""The server as OpenAI's own client and plain HTTP meet it: answers, streams, limits, errors."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Match
from tests.helpers import LocalModel
from tests.server.harness import Running, chat_body

from veriattn.engine.text import TextCodec
from veriattn.server.app import create_app
from veriattn.server.config import ServerConfig
from veriattn.spec.modelfile import ModelDirectory


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def codec(tiny_path: Any) -> TextCodec:
    d = ModelDirectory(tiny_path)
    m = d.manifest
    return TextCodec(d.tokenizer_json(), d.chat_template(), m.bos_id, m.eos_ids, m.add_bos, m.config.vocab_size)


MESSAGES: Any = [{"role": "user", "content": "hello"}]


def expected(local: LocalModel, codec: TextCodec, prompt: list[int], count: int) -> tuple[list[int], str]:
    """The greedy answer of the reference, cut after an end token."""
    ids = local.greedy(prompt, count)
    ends = [i for i, t in enumerate(ids) if t in codec.eos_ids]
    ids = ids[: ends[0] + 1] if ends else ids
    return ids, codec.decode(ids)


def stream_objects(text: str) -> list[Any]:
    """The events of a stream, `[DONE]` as a string."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(b.startswith("data: ") for b in blocks)
    return [b[6:] if b[6:] == "[DONE]" else json.loads(b[6:]) for b in blocks]


# -- answers -------------------------------------------------------------------------------------------------------


def test_chat_is_the_greedy_answer_of_the_reference(client: openai.OpenAI, local: LocalModel, codec: TextCodec) -> None:
    prompt = codec.encode_chat(MESSAGES)
    ids, text = expected(local, codec, prompt, 12)
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ("stop" if ids[-1] in codec.eos_ids else "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(ids))
    assert answer.usage.total_tokens == len(prompt) + len(ids)
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id


def test_completion_from_text_and_from_ids(client: openai.OpenAI, local: LocalModel, codec: TextCodec) -> None:
    ids, text = expected(local, codec, codec.encode("abc"), 9)
    by_text = client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0)
    by_ids = client.completions.create(model="tiny", prompt=codec.encode("abc"), max_tokens=9, temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text == text
    assert by_text.usage is not None
    assert by_text.usage.completion_tokens == len(ids)


def test_several_prompts_and_choices_come_in_order(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "max_tokens": 6, "temperature": 1, "seed": 5}
    both = client.completions.create(prompt=["abc", "xyz"], n=2, **options)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=p, n=2, **options) for p in ("abc", "xyz")]
    assert [c.text for c in both.choices] == [c.text for a in alone for c in a.choices]
    assert len({c.text for c in both.choices}) > 1


def test_a_seed_makes_a_sampled_answer_repeatable(client: openai.OpenAI) -> None:
    def answer(seed: int | None) -> str | None:
        options: Any = {} if seed is None else {"seed": seed}
        got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=16, temperature=1.5, **options)
        return got.choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(s) for s in range(6)}) > 1
    assert len({answer(None) for _ in range(6)}) > 1  # no seed: drawn afresh each time


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 1, "seed": 3}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_of_several_choices(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": "abc", "n": 3, "max_tokens": 8, "temperature": 1, "seed": 1}
    texts = ["", "", ""]
    for chunk in client.completions.create(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in client.completions.create(**options).choices]


def test_stream_framing(server: Running) -> None:
    response = server.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    objects = stream_objects(response.text)
    assert objects[-1] == "[DONE]"
    assert objects.count("[DONE]") == 1
    assert all(o["object"] == "chat.completion.chunk" for o in objects[:-1])


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 24, "temperature": 0}
    full = client.completions.create(**options).choices[0].text
    stop = full[5:7]
    cut = client.completions.create(stop=[stop, "\0never"], **options).choices[0]
    assert cut.text == full[: full.index(stop)]
    assert cut.finish_reason == "stop"
    streamed = client.completions.create(stop=stop, stream=True, **options)
    assert "".join(c.choices[0].text for c in streamed) == cut.text


def test_logprobs_of_chat_name_the_chosen_token_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content
    assert content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token  # greedy takes the most likely
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    raw = b"".join(bytes(e.bytes or []) for e in content)
    assert raw.decode("utf-8", "replace") == answer.choices[0].message.content


def test_logprobs_of_completions_have_offsets(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="abc", max_tokens=6, temperature=0, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0


def test_logit_bias_forces_a_token(client: openai.OpenAI, codec: TextCodec) -> None:
    token = codec.encode("q")[0]
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == "qqqq"


def test_max_completion_tokens_goes_before_max_tokens(server: Running) -> None:
    usage = server.chat(max_tokens=9, max_completion_tokens=2, ignore_eos=True).json()["usage"]
    assert usage["completion_tokens"] == 2


def test_content_parts_and_developer_role(server: Running) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    one = server.chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    two = server.chat(messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "a\nb"}])
    assert one.json()["choices"] == two.json()["choices"]
    assert one.json()["usage"] == two.json()["usage"]


def test_events_say_how_each_token_was_checked(server: Running) -> None:
    response = server.chat(stream=True, ignore_eos=True, max_tokens=5, veriattn={"events": True})
    events = [o["veriattn"] for o in stream_objects(response.text)[:-1] if "veriattn" in o]
    assert len(events) == 5
    assert all(e["checked"] is True and e["verification_lag_ms"] >= 0 for e in events)
    rows = [e["checks"]["linear_rows"] for e in events]
    # Two layers with four linears, and the row of logits, for each token.
    assert [b - a for a, b in itertools.pairwise(rows)] == [9, 9, 9, 9]


def test_concurrent_answers_equal_those_alone(server: Running) -> None:
    def ask(i: int) -> Any:
        return server.chat(f"question {i}" * (1 + i % 5), seed=i, temperature=1, max_tokens=10 + i).json()["choices"]

    alone = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


# -- the rest of the API -------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI, tiny_path: Any) -> None:
    digest = ModelDirectory(tiny_path).manifest.digest
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    assert model.model_extra is not None
    assert model.model_extra["veriattn"]["model_digest"] == digest
    answer = client.chat.completions.create(model=digest, messages=MESSAGES, max_tokens=1)
    assert answer.model == "tiny"
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert e.value.code == "model_not_found"


def test_health_ready_and_openapi(server: Running) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    ready = server.get("/ready").json()
    assert ready["ready"] is True
    assert ready["tamper_canary"] == "caught"
    assert ready["honest_request"] is True
    assert ready["attestation"] == "test"
    assert "/v1/chat/completions" in server.get("/openapi.json").json()["paths"]
    caught = server.wait_for("the tamper canary was caught")
    assert caught["code"] == "freivalds_mismatch" or caught["code"] == "attention_mismatch"


def test_request_ids(server: Running) -> None:
    assert server.get("/health").headers["x-request-id"].startswith("req_")
    assert server.get("/health", headers={"X-Request-Id": "my-id.7"}).headers["x-request-id"] == "my-id.7"
    assert server.get("/health", headers={"X-Request-Id": "no spaces"}).headers["x-request-id"].startswith("req_")


def test_no_cors_and_a_strict_content_policy(server: Running) -> None:
    response = server.get("/", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_and_its_assets_come_from_the_package(server: Running) -> None:
    html = server.get("/").text
    assets = [part.split('"')[0] for part in html.split('"assets/')[1:]]
    assert sorted(assets) == ["app.js", "icon.svg", "style.css"]
    for name in assets:
        assert server.get(f"/assets/{name}").status_code == 200
    assert "http://" not in html and "https://" not in html  # works without the internet


def test_no_route_hides_another() -> None:
    """Each route answers to a path of its own pattern: what stands before it takes none of them."""
    identity = SimpleNamespace(name="m", model_digest="0" * 64, max_positions=8)
    service: Any = SimpleNamespace(config=ServerConfig(), identity=identity)
    app = create_app(service)
    paths = [(r, re.sub(r"{[^}]*}", "x", r.path), m) for r in app.routes for m in r.methods or ()]  # type: ignore[attr-defined]
    assert {"/", "/assets/app.js", "/v1/models/x", "/v1/aci/receipts/x", "/metrics", "/openapi.json"} <= {
        p for _, p, _ in paths
    }
    for route, path, method in paths:
        scope = {"type": "http", "path": path, "root_path": "", "method": method, "headers": []}
        first = next(r for r in app.routes if r.matches(scope)[0] is Match.FULL)
        assert first is route, f"{method} {path} goes to {first}"


def test_metrics_count_what_happened(server: Running) -> None:
    before = server.metric("vllm:generation_tokens_total")
    rows = server.metric("veriattn:checks_total", kind="linear_rows")
    usage = server.chat(ignore_eos=True, max_tokens=5).json()["usage"]
    assert server.metric("vllm:generation_tokens_total") - before == 5
    # Each token of prompt and answer but the last goes through two layers of four linears; logits once for each step.
    tokens = usage["prompt_tokens"] + 5 - 1
    assert server.metric("veriattn:checks_total", kind="linear_rows") - rows == 8 * tokens + 5
    assert server.metric("veriattn:prover_bytes_total", direction="from_prover") > 0
    assert server.metric("veriattn:ready") == 1
    assert server.metric("veriattn:alarm") == 0
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:time_to_first_token_seconds_count") > 0


def test_logs_hold_no_prompt_and_no_answer(server: Running) -> None:
    prompt = "the quick brown fox of mine"
    answer = server.chat(prompt, max_tokens=24, headers={"X-Request-Id": "secret-1"})
    server.wait_for("request", request_id="secret-1")
    log = "\n".join(server.raw)
    assert prompt not in log
    assert answer.json()["choices"][0]["message"]["content"] not in log
    assert server.get("/v1/models/secret-path-part").status_code == 404
    assert "secret-path-part" not in "\n".join(server.raw)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, None),
        ({"response_format": {"type": "json_object"}}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"seed": 1.5}, "seed"),
        ({"veriattn": {"unknown": 1}}, "veriattn.unknown"),
        ({"best_of": True}, None),
    ],
)
def test_malformed_and_unsupported_requests_are_refused(
    server: Running, change: dict[str, Any], param: str | None
) -> None:
    body = json.dumps(chat_body() | change)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)


@pytest.mark.parametrize(
    "change",
    [
        {
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "service_tier": "auto",
            "store": False,
        },
        {"temperature": None, "stop": None, "n": None, "logit_bias": None, "user": "me", "stream_options": None},
        {"metadata": {"a": "b"}, "parallel_tool_calls": True, "some_future_field": [1, {"x": None}], "top_k": -1},
    ],
)
def test_fields_that_change_nothing_are_tolerated(server: Running, change: dict[str, Any]) -> None:
    assert server.chat(**change).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b'{"model": NaN}'])
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + "/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_what_cannot_fit_is_refused_with_its_numbers(server: Running, codec: TextCodec) -> None:
    long = server.chat("x" * 1100)
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"
    much = server.chat("x", max_tokens=1020)
    assert much.json()["error"]["code"] == "context_length_exceeded"
    assert "1024" in much.json()["error"]["message"]
    # Without max_tokens the answer ends where the context does.
    prompt = len(codec.encode_chat([{"role": "user", "content": "x" * 980}]))
    cut = server.chat("x" * 980, max_tokens=None, ignore_eos=True).json()
    assert cut["usage"]["completion_tokens"] == 1024 - prompt
    assert cut["choices"][0]["finish_reason"] == "length"


def test_a_body_that_is_too_large(server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    declared = httpx.post(server.url + "/v1/completions", content=b" " * (4 << 20) + b"{}", headers=headers)
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "request_too_large"

    def pieces() -> Any:
        for _ in range(80):
            yield b" " * 65536

    streamed = httpx.post(server.url + "/v1/completions", content=pieces(), headers=headers)
    assert streamed.status_code == 413


def test_unknown_paths_and_methods_are_refused_in_openai_shape(server: Running) -> None:
    assert server.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/chat/completions").status_code == 405
    assert server.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


def test_the_lying_switch_needs_demo(server: Running) -> None:
    response = server.chat(veriattn={"lie": True})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "demo_only"


# -- connections ---------------------------------------------------------------------------------------------------


def head_of(body: bytes) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: [::1]", "Connection: close", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode()


def test_a_client_that_goes_away_is_cancelled(server: Running) -> None:
    server.order("slow")
    body = json.dumps(chat_body(max_tokens=900, ignore_eos=True, stream=True)).encode()
    for stream in (True, False):
        raw = body if stream else body.replace(b'"stream": true', b'"stream": null')
        tokens = server.metric("vllm:generation_tokens_total")
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(head_of(raw) + raw)
            end = time.monotonic() + 60
            while server.metric("vllm:generation_tokens_total") < tokens + 5:
                assert time.monotonic() < end
        while server.metric("vllm:num_requests_running"):
            assert time.monotonic() < end
        assert server.metric("vllm:generation_tokens_total") - tokens < 900
    server.order("")


def test_a_body_in_small_pieces(server: Running) -> None:
    body = json.dumps(chat_body()).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        for at, piece in enumerate([head_of(body), body[:10], body[10:11], body[11:]]):
            sock.sendall(piece)
            time.sleep(0.02 * (at < 3))
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"]


# -- receipts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_receipt_hashes_the_raw_bytes_of_both_ways(server: Running, stream: bool) -> None:
    raw = json.dumps(chat_body(stream=stream)).encode()
    nonce = hashlib.sha256(raw).hexdigest()
    headers = {"Content-Type": "application/json", "X-ACI-Nonce": nonce}
    response = httpx.post(server.url + "/v1/chat/completions", content=raw, headers=headers, timeout=60)
    receipt = server.get("/v1/aci/receipts/" + response.headers["x-receipt-id"]).json()
    log = {e["type"]: e for e in receipt["event_log"]}
    assert log["request.received"]["body_hash"] == "sha256:" + hashlib.sha256(raw).hexdigest()
    assert log["response.returned"]["body_hash"] == "sha256:" + hashlib.sha256(response.content).hexdigest()
    event = log["gpu.verified"]
    assert event["result"] == "verified"
    assert event["client_nonce"] == nonce
    assert event["failures"] == 0
    assert event["choices"][0]["finish_reason"] in ("stop", "length")
    assert receipt["workload_keyset_digest"] == response.headers["x-aci-keyset-digest"]
    chat_id = receipt["chat_id"]
    assert server.get(f"/v1/aci/receipts/{chat_id}").json() == receipt
    signature = server.get(f"/v1/signature/{chat_id}").json()
    assert signature["signing_algo"] == "ed25519"


def test_attestation_needs_a_nonce_of_the_right_form(server: Running) -> None:
    report = server.get("/v1/aci/attestation?nonce=" + "ab" * 32)
    assert report.status_code == 200
    assert report.json()["nonce"] == "ab" * 32
    assert report.json()["attestation"]["tee_type"] == "test"
    for nonce in ("", "AB" * 32, "ab" * 31, "zz" * 32):
        assert server.get(f"/v1/aci/attestation?nonce={nonce}").status_code == 400
    assert server.get("/v1/aci/attestation").status_code == 400
    assert server.chat(headers={"X-ACI-Nonce": "short"}).status_code == 400
    assert server.get("/v1/aci/receipts/rcpt-" + "0" * 32).status_code == 404
