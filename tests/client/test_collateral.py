"""Collateral fetched from a PCCS, here one that serves what Intel once signed for the real quote."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.attest.synthetic_tdx import synthetic_image

from veriattn.attest.policy import Policy, TdxPolicy
from veriattn.attest.quotes import production_verifiers
from veriattn.client.remote import fetch_collateral
from veriattn.errors import AttestationError, AttestationUnavailable

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
EVIDENCE = {"quote": (VECTORS / "quote.bin").read_bytes().hex()}


@pytest.fixture
def pccs() -> Iterator[str]:
    c = json.loads((VECTORS / "collateral.json").read_text())
    answers: dict[str, tuple[bytes, str, str]] = {
        "/sgx/certification/v4/pckcrl": (
            bytes.fromhex(c["pck_crl"]),
            "SGX-PCK-CRL-Issuer-Chain",
            c["pck_crl_issuer_chain"],
        ),
        "/sgx/certification/v4/rootcacrl": (c["root_ca_crl"].encode(), "", ""),
        "/tdx/certification/v4/tcb": (
            f'{{"tcbInfo":{c["tcb_info"]},"signature":"{c["tcb_info_signature"]}"}}'.encode(),
            "TCB-Info-Issuer-Chain",
            c["tcb_info_issuer_chain"],
        ),
        "/tdx/certification/v4/qe/identity": (
            f'{{"enclaveIdentity":{c["qe_identity"]},"signature":"{c["qe_identity_signature"]}"}}'.encode(),
            "SGX-Enclave-Identity-Issuer-Chain",
            c["qe_identity_issuer_chain"],
        ),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, header, chain = answers.get(urllib.parse.urlsplit(self.path).path, (b"", "", ""))
            self.send_response(200 if body else 404)
            if header:
                self.send_header(header, urllib.parse.quote(chain))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetched_collateral_verifies_the_quote_at_its_time(pccs: str) -> None:
    collateral = fetch_collateral(EVIDENCE, pccs)
    tdx = production_verifiers(Policy(tdx=TdxPolicy((synthetic_image(),))))["tdx"]
    assert tdx.verify(dict(EVIDENCE), collateral, 1751673600).status == "UpToDate"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense"])
def test_nothing_to_be_had(url: str) -> None:
    with pytest.raises(AttestationUnavailable, match="no collateral"):
        fetch_collateral(dict(EVIDENCE), url)


def test_evidence_that_is_no_quote(pccs: str) -> None:
    with pytest.raises(AttestationUnavailable):
        fetch_collateral({"quote": "00"}, pccs)
    with pytest.raises(AttestationError):
        fetch_collateral({"warning": "no TEE"}, pccs)
