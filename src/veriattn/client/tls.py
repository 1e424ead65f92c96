"""TLS that ends inside the TEE: accept a certificate because attestation vouches for its key, not an authority."""

from __future__ import annotations

import secrets
import ssl
import urllib.parse
from dataclasses import replace

from veriattn.attest.verify import Expectations, ReceiptVerifier
from veriattn.client.remote import Remote, spki_sha256
from veriattn.errors import AttestationUnavailable, UsageError


def attested_certificate(
    base_url: str, verifier: ReceiptVerifier, expect: Expectations, timeout_s: float = 60.0
) -> str:
    """The certificate (PEM) of a server, after a quote of its TEE has vouched for the certificate's key.

    1. Take the certificate that the server shows; nothing is sent.
    2. Over connections to that key alone, ask for an attestation report on a fresh nonce, without an API key.
    3. Verify the report: the quote, the pinned measurements, and that its key set names this TLS key.

    From then on connections that accept this certificate only (`remote.pinned_context`) end inside that TEE: whoever
    stands in between has another key. Of `expect`, the time and the collateral are used.

    Raises: AttestationError where a step does not pass; AttestationUnavailable; UsageError for other URLs than https.
    """
    url = urllib.parse.urlsplit(base_url)
    if url.scheme != "https" or not url.hostname:
        raise UsageError(f"{base_url!r} is not an https URL", hint="there is no TLS key to attest")
    try:
        pem = ssl.get_server_certificate((url.hostname, url.port or 443), timeout=timeout_s)
    except (OSError, ValueError) as e:
        raise AttestationUnavailable(f"{url.hostname} does not speak TLS: {e}") from None
    nonce = secrets.token_hex(32)
    report = Remote(base_url, certificate_pem=pem, timeout_s=timeout_s).attestation(nonce)
    spki = spki_sha256(ssl.PEM_cert_to_DER_cert(pem))
    verifier.verify_attestation(report, replace(expect, attestation_nonce=nonce, tls_spki_sha256=spki)).require()
    return pem
