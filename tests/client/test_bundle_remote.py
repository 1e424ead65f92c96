"""Bundles and fetching: damaged files, servers that answer oddly."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.conftest import API_KEY, FakeServer, canned_event

from veriattn.client.bundle import Bundle
from veriattn.client.remote import Remote
from veriattn.errors import AttestationError, AttestationUnavailable, ModelError, ReceiptNotFound, UsageError


def test_a_bare_receipt_is_a_bundle_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"receipt_id": "x"}')
    assert Bundle.load(path) == Bundle({"receipt_id": "x"})


@pytest.mark.parametrize(
    "change",
    [
        {"receipt": None}, {"receipt": []}, {"attestation": 5}, {"request_base64": "!"}, {"response_base64": 5},
        {"client_nonce": 5}, {"attestation_nonce": {}}, {"request_base64": 1.5},
    ],
)  # fmt: skip
def test_damaged_bundles(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps({**Bundle({"receipt_id": "x"}, request=b"a").to_json(), **change}))
    with pytest.raises(AttestationError):
        Bundle.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        Bundle.load(tmp_path / "none")
    with pytest.raises(ModelError, match="cannot write"):
        Bundle({}).save(tmp_path / "none" / "b.json")
    (tmp_path / "bad").write_bytes(b"\x00")
    with pytest.raises(AttestationError, match="not JSON"):
        Bundle.load(tmp_path / "bad")


def test_receipts_and_reports_are_fetched(fake_server: FakeServer) -> None:
    service = fake_server.service
    issued = service.issue(b"q", b"a", canned_event(None), API_KEY, "odd/id?&")
    for url in (fake_server.url, fake_server.url.removesuffix("/v1"), fake_server.url + "/"):
        remote = Remote(url, API_KEY)
        assert remote.receipt(issued["receipt_id"]) == issued
        assert remote.receipt("odd/id?&") == issued
        report = remote.attestation("0" * 64, service.keyset_digest())
        assert report["workload_keyset_digest"] == service.keyset_digest()
    with pytest.raises(ReceiptNotFound):
        Remote(fake_server.url, "sk-other").receipt(issued["receipt_id"])
    with pytest.raises(AttestationUnavailable, match="HTTP 400"):
        Remote(fake_server.url).attestation("0" * 64, "sha256:" + "0" * 64)
    with pytest.raises(UsageError):
        Remote(fake_server.url).attestation("short")


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "file:///etc/passwd", "x"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UsageError):
        Remote(url).receipt("x")


@pytest.fixture
def odd_server() -> Iterator[Any]:
    """Answers every connection with the bytes that it is told."""
    listener = socket.create_server(("127.0.0.1", 0))
    answer: list[bytes] = [b""]

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(answer[0])

    threading.Thread(target=serve, daemon=True).start()
    yield lambda raw: (answer.__setitem__(0, raw), f"http://127.0.0.1:{listener.getsockname()[1]}")[1]
    listener.close()


@pytest.mark.parametrize(
    ("raw", "kind", "fragment"),
    [
        (b"", AttestationUnavailable, "does not answer"),
        (b"junk\r\n\r\n", AttestationUnavailable, "does not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", AttestationError, "not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", AttestationError, "not a JSON object"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
            AttestationUnavailable,
            "HTTP 302",
        ),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 0\r\n\r\n", AttestationUnavailable, "HTTP 429"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (9 << 20), AttestationUnavailable, "larger than"),
    ],
)
def test_servers_that_answer_oddly(odd_server: Any, raw: bytes, kind: type[Exception], fragment: str) -> None:
    with pytest.raises(kind, match=fragment):
        Remote(odd_server(raw), timeout_s=10).receipt("x")
