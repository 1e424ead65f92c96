"""TLS keys that a quote vouches for: nothing is sent before it has, and someone in between is refused."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, SyntheticTdxProvider, synthetic_image
from tests.client.conftest import API_KEY, CANNED_MODEL, canned_answer, canned_event

from veriattn.attest import receipts
from veriattn.attest.keys import TlsKey
from veriattn.attest.policy import Policy, TdxPolicy
from veriattn.attest.providers import TestProvider
from veriattn.attest.quotes import TdxVerifier
from veriattn.attest.service import ReceiptService
from veriattn.attest.verify import Expectations, ReceiptVerifier
from veriattn.client.remote import Remote
from veriattn.client.sdk import VerifiedOpenAI, capturing_transport, http_library
from veriattn.client.tls import attested_certificate
from veriattn.errors import AttestationError, AttestationUnavailable, UsageError


def self_signed(directory: Path) -> tuple[ssl.SSLContext, str]:
    """A server's context with a fresh key, and the hash of that key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "veriattn")])
    today = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(today - dt.timedelta(days=1))
        .not_valid_after(today + dt.timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = directory / f"{certificate.serial_number}.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return context, hashlib.sha256(spki).hexdigest()


@dataclass
class TlsServer:
    """A server of receipts over TLS. `sent` is what clients sent: paths and API keys."""

    url: str
    service: ReceiptService
    sent: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture
def start(tmp_path: Path, platform: SyntheticTdx) -> Iterator[Callable[..., TlsServer]]:
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def make(provider: Any = None, service: ReceiptService | None = None, names_key: bool = True) -> TlsServer:
        context, spki = self_signed(tmp_path)
        keys = [TlsKey(spki, "veriattn")] if names_key else []
        provider = provider or SyntheticTdxProvider(platform)
        service = service or ReceiptService(provider, tls_keys=keys, clock=lambda: float(NOW))
        server: TlsServer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, key = self._note()
                if "/attestation?" in path:
                    query = dict(p.split("=") for p in path.partition("?")[2].replace("%3A", ":").split("&"))
                    self._send(json.dumps(service.attestation(query["nonce"], query.get("keyset_digest"))).encode())
                else:
                    self._send(json.dumps(service.get(path.rsplit("/", 1)[1], key)).encode())

            def do_POST(self) -> None:
                self._note()
                request = self.rfile.read(int(self.headers["Content-Length"]))
                event = canned_event(self.headers[receipts.NONCE_HEADER])
                issued = service.issue(request, canned_answer(), event, API_KEY, "chatcmpl-7")
                self._send(canned_answer(), issued["receipt_id"])

            def _note(self) -> tuple[str, str]:
                key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                server.sent.append((self.path.partition("?")[0], key))
                return self.path, key

            def _send(self, raw: bytes, receipt_id: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.send_header(receipts.RECEIPT_HEADER, receipt_id)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((httpd, thread))
        server = TlsServer(f"https://127.0.0.1:{httpd.server_port}/v1", service)
        return server

    yield make
    for httpd, thread in running:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@pytest.fixture
def verifier(platform: SyntheticTdx) -> ReceiptVerifier:
    return ReceiptVerifier({"tdx": TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der)})


def connect(server: TlsServer, verifier: ReceiptVerifier) -> VerifiedOpenAI:
    return VerifiedOpenAI.attested(
        server.url, API_KEY, policy=Policy(), verifier=verifier, clock=lambda: float(NOW), model_digests=[CANNED_MODEL],
        max_retries=0,
    )  # fmt: skip


def ask(client: VerifiedOpenAI) -> Any:
    return client.openai.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])


def test_an_attested_connection(start: Callable[..., TlsServer], verifier: ReceiptVerifier) -> None:
    pytest.importorskip("openai")
    server = start()
    with connect(server, verifier) as client:
        assert server.sent == [("/v1/aci/attestation", "")]
        v = client.verify(ask(client))
        v.require()
        assert v.steps[-1].name == "tls.key"


def test_someone_in_between_gets_nothing(start: Callable[..., TlsServer], verifier: ReceiptVerifier) -> None:
    """Another key on the wire, the honest server's report behind it: refused, and no API key was sent."""
    pytest.importorskip("openai")
    honest = start()
    between = start(service=honest.service)
    with pytest.raises(AttestationError, match=r"tls\.key"):
        connect(between, verifier)
    assert between.sent == [("/v1/aci/attestation", "")]
    pem = attested_certificate(honest.url, verifier, Expectations(NOW))
    with pytest.raises(AttestationUnavailable, match="does not answer"):
        Remote(between.url, API_KEY, certificate_pem=pem).receipt("x")
    assert between.sent == [("/v1/aci/attestation", "")]


def test_the_key_is_that_of_the_connection_that_carried_the_answer(
    start: Callable[..., TlsServer], verifier: ReceiptVerifier
) -> None:
    """Someone with a certificate of an authority stands in between for prompts alone; receipts come straight."""
    openai = pytest.importorskip("openai")
    honest = start()
    between = start(service=honest.service)
    pem = attested_certificate(honest.url, verifier, Expectations(NOW))
    for server, failed in ((honest, []), (between, ["tls.key"])):
        transport = http_library(openai).HTTPTransport(verify=False)
        remote = Remote(honest.url, API_KEY, certificate_pem=pem)
        with VerifiedOpenAI(
            server.url, API_KEY, verifier=verifier, clock=lambda: float(NOW), model_digests=[CANNED_MODEL],
            remote=remote, transport=transport, max_retries=0,
        ) as client:  # fmt: skip
            v = client.verify(ask(client))
            assert (v.failed(), v.skipped(), v.steps[-1].name) == (failed, [], "tls.key")


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_both_http_libraries_show_the_key(name: str, start: Callable[..., TlsServer]) -> None:
    library, server, kept = pytest.importorskip(name), start(), []
    transport = capturing_transport(library, library.HTTPTransport(verify=False), kept.append)
    with library.Client(transport=transport) as http:
        http.post(server.url + "/chat/completions", json={})
    assert [e.tls_spki_sha256 for e in kept] == [server.service.keyset().tls_keys[0].spki_sha256]


def test_what_does_not_vouch_for_the_key(
    start: Callable[..., TlsServer], verifier: ReceiptVerifier, platform: SyntheticTdx
) -> None:
    expect = Expectations(NOW)
    for server, step in (
        (start(names_key=False), r"tls\.key"),
        (start(TestProvider()), r"quote\.signature"),
        (start(SyntheticTdxProvider(platform, image="other")), r"quote\.measurements"),
        (start(SyntheticTdxProvider(platform, debug=True)), r"quote\.signature"),
    ):
        with pytest.raises(AttestationError, match=step):
            attested_certificate(server.url, verifier, expect)
    with pytest.raises(AttestationError, match=r"quote\.signature"):
        attested_certificate(start().url, ReceiptVerifier({}), expect)
    with pytest.raises(UsageError):
        attested_certificate("http://127.0.0.1:1", verifier, expect)
    with pytest.raises(AttestationUnavailable):
        attested_certificate("https://127.0.0.1:1", verifier, expect)


def test_an_unknown_authority_is_refused_without_attestation(start: Callable[..., TlsServer]) -> None:
    server = start()
    with pytest.raises(AttestationUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        Remote(server.url, API_KEY).attestation("0" * 64)
    assert server.sent == []
