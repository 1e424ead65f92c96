"""The wrapper around the OpenAI SDK, over a real socket; the SDK is whichever version is installed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, synthetic_image
from tests.client.conftest import API_KEY, CANNED_MODEL, FakeServer, canned_answer, canned_stream

from veriattn.attest.policy import TdxPolicy
from veriattn.attest.quotes import TdxVerifier
from veriattn.attest.verify import ReceiptVerifier
from veriattn.client import Bundle, VerifiedOpenAI
from veriattn.client.sdk import Exchange, capturing_transport, http_library
from veriattn.errors import AttestationError, ReceiptNotFound, UsageError

openai = pytest.importorskip("openai")
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(fake_server: FakeServer, platform: SyntheticTdx) -> Callable[..., VerifiedOpenAI]:
    def make(**options: Any) -> VerifiedOpenAI:
        verifier = ReceiptVerifier({"tdx": TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der)})
        defaults = {"verifier": verifier, "model_digests": [CANNED_MODEL], "clock": lambda: float(NOW)}
        return VerifiedOpenAI(fake_server.url, API_KEY, max_retries=0, **{**defaults, **options})

    return make


def ask(c: VerifiedOpenAI, model: str = "m", **options: Any) -> Any:
    return c.openai.chat.completions.create(model=model, messages=MESSAGES, **options)


def test_an_answer_is_verified(client: Callable[..., VerifiedOpenAI]) -> None:
    with client() as c:
        answer = ask(c)
        assert answer.choices[0].message.content == "Hello \u2028\u00e4"
        v = c.verify(answer)
        assert [s for s in v.steps if s.status != "PASS"] == []
        v.require()
        assert c.last is not None
        assert c.last.response == canned_answer()
        assert json.loads(c.last.request)["messages"] == MESSAGES


def test_a_stream_is_verified_once_it_has_been_read(client: Callable[..., VerifiedOpenAI]) -> None:
    with client() as c:
        stream = ask(c, stream=True)
        with pytest.raises(UsageError, match="not read to its end"):
            c.verify()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == "Hello \u2028"
        assert c.last is not None
        assert c.last.response == canned_stream()
        c.verify().require()
        c.verify("chatcmpl-7").require()


def test_every_request_has_a_nonce_of_its_own(client: Callable[..., VerifiedOpenAI]) -> None:
    with client() as c:
        ask(c)
        first = c.last
        ask(c)
        second = c.last
        assert first is not None
        assert second is not None
        assert first.nonce != second.nonce
        assert first.receipt_id != second.receipt_id
        c.verify(first).require()
        c.verify(second).require()
        # The receipt of one exchange does not pass for another.
        assert second.receipt_id is not None
        swapped = Exchange(first.request, first.nonce, second.receipt_id, first.chunks, ended=True)
        assert c.verify(swapped).failed() == ["receipt.nonce"]


def test_one_report_serves_for_a_while(client: Callable[..., VerifiedOpenAI], fake_server: FakeServer) -> None:
    now = [float(NOW)]
    with client(clock=lambda: now[0], attestation_max_age_s=100) as c:
        for _ in range(3):
            ask(c)
            c.verify().require()
        assert sum("attestation" in path for path in fake_server.seen) == 1
        now[0] += 101
        c.verify().require()
        assert sum("attestation" in path for path in fake_server.seen) == 2
        fake_server.service.rotate()
        ask(c)
        c.verify().require()
        assert sum("attestation" in path for path in fake_server.seen) == 3


def tampered(raw: bytes) -> bytes:
    return raw.replace(b"Hello", b"Hallo").replace(b"Hel", b"Hal")


def test_bytes_changed_on_the_way_are_refused(client: Callable[..., VerifiedOpenAI], fake_server: FakeServer) -> None:
    with client() as c:
        fake_server.between.append(tampered)
        answer = ask(c)
        assert answer.choices[0].message.content.startswith("Hallo")
        v = c.verify(answer)
        assert v.failed() == ["receipt.response"]
        with pytest.raises(AttestationError, match=r"receipt\.response"):
            v.require()


def test_the_receipt_of_another_exchange_does_not_pass_for_an_answers_own(
    client: Callable[..., VerifiedOpenAI], fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sits in between alters one answer, lets the next one pass, and gives out its receipt for both."""
    fake_server.ids += ["chatcmpl-a", "chatcmpl-b"]
    fake_server.between += [tampered, bytes]
    with client() as c:
        altered, honest = ask(c), ask(c)
        assert c.last is not None
        real, receipt_id = fake_server.service.get, c.last.receipt_id

        def get(ident: str, key: str) -> Any:
            return real(str(receipt_id) if ident == "chatcmpl-a" else ident, key)

        monkeypatch.setattr(fake_server.service, "get", get)
        c.verify(honest).require()
        assert c.verify(altered).failed() == ["receipt.response"]


def in_crlf(raw: bytes) -> bytes:
    return raw.replace(b"\n", b"\r\n")


def in_two_lines(raw: bytes) -> bytes:
    return raw.replace(b'"chatcmpl-a"', b'\ndata: "chatcmpl-b"')


ODD: dict[str, tuple[bool, Callable[[bytes], bytes]]] = {
    "plain": (False, lambda r: r.replace(b"chatcmpl-a", b"chatcmpl-b")),
    "twice": (False, lambda r: r.replace(b'"id": "chatcmpl-a"', b'"id": "chatcmpl-a", "id": "chatcmpl-b"')),
    "escaped": (False, lambda r: r.replace(b"chatcmpl-a", b"\\u0063hatcmpl-b")),
    "two bytes a letter": (False, lambda r: r.replace(b"chatcmpl-a", b"chatcmpl-b").decode().encode("utf-16")),
    "events": (True, lambda r: r.replace(b"chatcmpl-a", b"chatcmpl-b")),
    "last event": (True, lambda r: b"chatcmpl-b".join(r.rsplit(b"chatcmpl-a", 1))),
    "events with other ends": (True, lambda r: in_crlf(r.replace(b"chatcmpl-a", b"chatcmpl-b"))),
    "events in two lines": (True, in_two_lines),
    "an event that does not end": (True, lambda r: r[:-16].replace(b"chatcmpl-a", b"chatcmpl-b").rstrip()),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_answer_that_bears_the_id_of_another(
    odd: str, client: Callable[..., VerifiedOpenAI], fake_server: FakeServer
) -> None:
    """However the id is written: what the SDK reads it from is not taken for the exchange that it belongs to."""
    stream, write = ODD[odd]
    fake_server.ids += ["chatcmpl-a", "chatcmpl-b"]
    fake_server.between += [lambda r: write(tampered(r)), bytes]
    with client() as c:
        answer = ask(c, stream=stream)
        altered, ids = c.last, ({chunk.id for chunk in answer} if stream else {answer.id})
        assert altered is not None
        assert "chatcmpl-b" in ids
        honest = ask(c)
        for of in (honest, "chatcmpl-b"):
            with pytest.raises(AttestationError, match="several responses"):
                c.verify(of)
        if altered.complete:
            assert c.verify(altered).failed() == ["receipt.response"]
        else:
            with pytest.raises(UsageError, match="not read to its end"):
                c.verify(altered)
        c.verify().require()


def test_what_bears_no_id_is_in_nobodys_way(client: Callable[..., VerifiedOpenAI], fake_server: FakeServer) -> None:
    """An error in HTML, an error in JSON, a stream that was left."""
    fake_server.ids += ["chatcmpl-a", "chatcmpl-b"]
    with client() as c:
        c._remember(Exchange(b"", "", None, [b"<html>"], ended=True, status=502))
        c._remember(Exchange(b"", "", None, [canned_stream()[:-30]]))
        answer = ask(c, stream=True)
        assert next(answer).id == "chatcmpl-a"
        answer.close()
        c.verify(ask(c)).require()
        with pytest.raises(ReceiptNotFound):
            c.verify("chatcmpl-c")


def test_production_verifiers_are_the_default(client: Callable[..., VerifiedOpenAI]) -> None:
    with client(verifier=None) as c:
        ask(c)
        v = c.verify()
        assert v.verdict == "NOT VERIFIED"
        assert "quote.signature" in v.skipped()


def test_what_cannot_be_verified(client: Callable[..., VerifiedOpenAI]) -> None:
    with client(keep=1) as c:
        with pytest.raises(UsageError, match="no exchange"):
            c.verify()
        ask(c, "no-receipts")
        with pytest.raises(AttestationError, match="names no receipt"):
            c.verify()
        with pytest.raises(UsageError, match="neither an answer"):
            c.verify(5)
        with pytest.raises(ReceiptNotFound):
            c.verify("chatcmpl-unknown")
        ask(c)
        forgotten = c.last
        ask(c)
        assert forgotten is not None
        with pytest.raises(UsageError, match="not remembered"):
            c.verify(forgotten.receipt_id)


def test_a_bundle_is_kept_and_read_again(client: Callable[..., VerifiedOpenAI], tmp_path: Path) -> None:
    with client() as c:
        ask(c)
        bundle = c.bundle()
        path = tmp_path / "answer.json"
        bundle.save(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert Bundle.load(path) == bundle
        assert bundle.response == canned_answer()


def test_other_requests_pass_untouched(client: Callable[..., VerifiedOpenAI], fake_server: FakeServer) -> None:
    with client() as c:
        with pytest.raises(openai.APIStatusError):
            c.openai.models.list()
        assert c.last is None
        assert fake_server.seen == ["/v1/models"]


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_both_http_libraries(name: str) -> None:
    """Capture with the library of SDK 2.x and that of 3.x, in pieces, with a body that is left unread."""
    library = pytest.importorskip(name)
    kept: list[Exchange] = []
    pieces = [b"data: a\n\n", b"data: b\n\n", b"data: [DONE]\n\n"]

    def handler(request: Any) -> Any:
        assert len(request.headers["X-ACI-Nonce"]) == 64
        assert request.headers["Accept-Encoding"] == "identity"
        return library.Response(200, content=iter(pieces), headers={"X-Receipt-Id": "rcpt-1"})

    transport = capturing_transport(library, library.MockTransport(handler), kept.append)
    with library.Client(transport=transport) as http:
        with http.stream("POST", "http://x/v1/completions", json={"a": 1}) as response:
            assert not kept[0].complete
            assert b"".join(response.iter_raw()) == b"".join(pieces)
        assert (kept[0].complete, kept[0].response, kept[0].receipt_id) == (True, b"".join(pieces), "rcpt-1")
        assert json.loads(kept[0].request) == {"a": 1}
        with http.stream("POST", "http://x/v1/chat/completions", json={}):
            pass
        assert not kept[1].complete
        assert kept[0].nonce != kept[1].nonce
        mine = "f" * 64
        http.post("http://x/v1/completions", json={}, headers={"X-ACI-Nonce": mine})
        assert kept[2].nonce == mine


def test_the_library_is_the_sdks_own() -> None:
    expected = "httpx2" if int(openai.__version__.split(".")[0]) >= 3 else "httpx"
    assert http_library(openai) is importlib.import_module(expected)
