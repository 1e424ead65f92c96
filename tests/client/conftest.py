"""Tiny models, answers of theirs with receipts, and a server that hands the receipts out."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, SyntheticTdxProvider
from tests.helpers import make_model

from veriattn.attest import receipts
from veriattn.attest.providers import TestProvider
from veriattn.attest.service import ReceiptService
from veriattn.client.replay import ReplayModel
from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.errors import ReceiptNotFound, UsageError
from veriattn.spec.sampler import SamplingParams

MESSAGES = [{"role": "user", "content": "abc"}]
API_KEY = "sk-test"


@dataclass(frozen=True)
class Answer:
    """What a client holds of one response, and the ids that nobody tells it."""

    receipt: dict[str, Any]
    request: bytes
    response: bytes
    prompts: list[list[int]]
    outputs: list[list[int]]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(path)
    return path


@pytest.fixture(scope="session")
def other_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "other"
    make_model(path, seed=1)
    return path


@pytest.fixture(scope="session")
def replay_model(model_path: Path) -> ReplayModel:
    return ReplayModel(model_path)


@pytest.fixture(scope="session")
def engine(model_path: Path) -> Engine:
    return Engine(model_path, EngineConfig(strategy="full-tee"))


def sampling_fields(params: SamplingParams, ignore_eos: bool = False) -> dict[str, Any]:
    """The fields of a request that ask for these parameters."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    biases = {str(i): b for i, b in params.logit_bias}
    fields = {n: getattr(params, n) for n in names}
    return {**fields, "logit_bias": biases, "seed": params.seed, "ignore_eos": ignore_eos}


def sse(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + b"data: [DONE]\n\n"


@pytest.fixture(scope="session")
def answer(engine: Engine) -> Callable[..., Answer]:
    """Generate, and issue a receipt the way the server does."""

    def make(
        params: SamplingParams | None = None,
        *,
        body: dict[str, Any] | None = None,
        max_tokens: int = 24,
        n: int = 1,
        stream: bool = False,
        token_ids: bool = False,
        stop: tuple[str, ...] = (),
        ignore_eos: bool = False,
        service: ReceiptService | None = None,
        event_changes: dict[str, Any] | None = None,
        respond: Callable[[dict[str, Any]], dict[str, Any]] = lambda r: r,
        nonce: str | None = None,
        ask: dict[str, Any] | None = None,
    ) -> Answer:
        """ask: fields of the request that say other than what was done."""
        params = params or SamplingParams()
        body = body or {"messages": MESSAGES}
        asked = {**body, "max_tokens": max_tokens, "stop": list(stop), "n": n, "stream": stream}
        asked = {**asked, **sampling_fields(params, ignore_eos), **(ask or {})}
        if "messages" in body:
            prompts = [engine.codec.encode_chat(body["messages"])]
        else:
            prompt = body["prompt"]
            given = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
            prompts = [engine.codec.encode(p) if isinstance(p, str) else p for p in given]
        wanted = [
            engine.submit(Request(tuple(p), params, max_tokens, stop, ignore_eos=ignore_eos, choice=choice))
            for p in prompts
            for choice in range(n)
        ]
        engine.run_all()
        states = [engine.states[i] for i in wanted]
        choices = []
        for index, state in enumerate(states):
            text = state.text
            shape: dict[str, Any] = {"message": {"content": text}} if "messages" in body else {"text": text}
            ids = {"token_ids": list(state.output_ids)} if token_ids else {}
            choices.append({"index": index, "finish_reason": state.finish_reason, **shape, **ids})
        whole = respond({"id": "chatcmpl-1", "choices": choices})
        if stream:
            events: list[dict[str, Any]] = []
            for c in whole["choices"]:
                content = c.get("message", {}).get("content", c.get("text"))
                for piece in [*content, None]:
                    delta = {"delta": {"content": piece} if piece else {}} if "message" in c else {"text": piece or ""}
                    reason = None if piece else c["finish_reason"]
                    events.append({"choices": [{"index": c["index"], "finish_reason": reason, **delta}]})
            response = sse([*events, {"choices": [], "usage": {"prompt_tokens": 1}}])
        else:
            response = json.dumps(whole, ensure_ascii=False).encode()
        event = receipts.verification_event(
            **{
                "model_digest": engine.model.manifest.digest,
                "strategy": "run-ahead",
                "guarantee": "exact",
                "checks": {"linear_rows": 1},
                "soundness_bits": 99,
                "prompts": prompts,
                "choices": [
                    receipts.choice_json(i, s.output_ids, s.finish_reason or "", prompt=i // n, choice=i % n)
                    for i, s in enumerate(states)
                ],
                "sampling": receipts.sampling_json(params, max_tokens, ignore_eos=ignore_eos),
                "config": {},
                "client_nonce": nonce,
                **(event_changes or {}),
            }
        )
        service = service or ReceiptService(TestProvider())
        request = json.dumps(asked).encode()
        issued = service.issue(request, response, event, API_KEY, "chatcmpl-1", model="tiny")
        return Answer(issued, request, response, [list(p) for p in prompts], [list(s.output_ids) for s in states])

    return make


CANNED_MODEL = "7" * 64


def canned_event(nonce: str | None) -> dict[str, Any]:
    return receipts.verification_event(
        model_digest=CANNED_MODEL,
        strategy="run-ahead",
        guarantee="exact",
        checks={"linear_rows": 1},
        soundness_bits=99,
        prompts=[[1]],
        choices=[receipts.choice_json(0, [1], "stop")],
        sampling=receipts.sampling_json(SamplingParams(), 8),
        config={},
        client_nonce=nonce,
    )


def canned_answer() -> bytes:
    message = {"role": "assistant", "content": "Hello \u2028\u00e4", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    head = {"id": "chatcmpl-7", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**head, "choices": [choice], "usage": usage}, ensure_ascii=False).encode()


def canned_stream() -> bytes:
    head = {"id": "chatcmpl-7", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return sse(
        [
            {**head, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}
            for text, reason in (("Hel", None), ("lo \u2028", None), ("", "stop"))
        ]
    )


@pytest.fixture(scope="session")
def platform() -> SyntheticTdx:
    return SyntheticTdx()


@dataclass
class FakeServer:
    """The receipt endpoints of a server over a real socket. `seen` are the paths asked for; `ids` of the next responses;
    `between`: what somebody on the way does to them."""

    url: str
    service: ReceiptService
    seen: list[str]
    ids: list[str]
    between: list[Callable[[bytes], bytes]]


@pytest.fixture
def fake_server(platform: SyntheticTdx) -> Iterator[FakeServer]:
    service = ReceiptService(SyntheticTdxProvider(platform), clock=lambda: float(NOW))
    seen: list[str] = []
    ids: list[str] = []
    between: list[Callable[[bytes], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            try:
                if url.path == "/v1/aci/attestation":
                    return self._send(200, service.attestation(query["nonce"], query.get("keyset_digest")))
                if url.path.startswith("/v1/aci/receipts/"):
                    key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                    return self._send(200, service.get(urllib.parse.unquote(url.path.rsplit("/", 1)[1]), key))
            except ReceiptNotFound:
                return self._send(404, {})
            except UsageError:
                return self._send(400, {})
            self._send(500, {})

        def do_POST(self) -> None:
            request = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(request)
            receipt_id = service.new_receipt_id()
            response = canned_stream() if body.get("stream") else canned_answer()
            if ids:
                response = response.replace(b"chatcmpl-7", ids[0].encode())
            event = canned_event(self.headers.get(receipts.NONCE_HEADER))
            chat_id = ids.pop(0) if ids else "chatcmpl-7"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
            if body["model"] != "no-receipts":
                service.issue(request, response, event, API_KEY, chat_id, receipt_id=receipt_id)
                self.send_header(receipts.RECEIPT_HEADER, receipt_id)
            self.end_headers()
            # What a proxy in between might do to the bytes.
            self.wfile.write(between.pop(0)(response) if between else response)

        def _send(self, status: int, body: dict[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield FakeServer(f"http://127.0.0.1:{server.server_port}/v1", service, seen, ids, between)
    server.shutdown()
    server.server_close()
    thread.join()
