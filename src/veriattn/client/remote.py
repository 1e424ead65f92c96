"""Fetching receipts and attestation reports over HTTP, with the standard library alone."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import ssl
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from veriattn.attest.canonical import Json, parse_object
from veriattn.attest.keys import check_nonce
from veriattn.attest.quotes import MAX_QUOTE_BYTES, hex_field
from veriattn.errors import AttestationError, AttestationUnavailable, ReceiptNotFound, UsageError

_MAX_BYTES = 8 << 20


def spki_sha256(certificate_der: bytes) -> str:
    """Hash of a certificate's public key, as key sets have it."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def pinned_context(certificate_pem: str) -> ssl.SSLContext:
    """TLS to whoever holds the key of this one certificate; names and authorities do not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate_pem)
    return context


@dataclass
class Remote:
    """One server. `base_url` is the one given to an SDK, with or without `/v1`. No redirects are followed.

    ca_file: certificate authorities, instead of the system's. certificate_pem: the one certificate to accept, whatever
    name it bears (`client.tls.attested_certificate`). After a request over TLS, `tls_spki_sha256` is the hash of the key
    at the other end.
    Raises: UsageError for a URL that is none; AttestationUnavailable where the server does not answer as it should.
    """

    base_url: str
    api_key: str | None = None
    ca_file: Path | None = None
    timeout_s: float = 60.0
    tls_spki_sha256: str | None = None
    certificate_pem: str | None = None

    def receipt(self, receipt_or_chat_id: str) -> Json:
        """A receipt by its id or its response's. Raises: ReceiptNotFound."""
        return self._get(f"/v1/aci/receipts/{urllib.parse.quote(receipt_or_chat_id, safe='')}", "receipt")

    def attestation(self, nonce: str, keyset_digest: str | None = None) -> Json:
        """A report over the nonce, and over the named key set where the server still knows it."""
        query = {"nonce": check_nonce(nonce)} | ({"keyset_digest": keyset_digest} if keyset_digest else {})
        return self._get("/v1/aci/attestation?" + urllib.parse.urlencode(query), "attestation report")

    def _get(self, path: str, what: str) -> Json:
        status, body = self._fetch(path)
        if status == 404:
            raise ReceiptNotFound(
                f"the server has no such {what}",
                hint="receipts are kept for a while, and only for the API key that asked",
            )
        if status != 200:
            hint = {401: "give the API key that made the request", 429: "try again in a while"}.get(status)
            raise AttestationUnavailable(f"the server answers HTTP {status} to the request for the {what}", hint=hint)
        return parse_object(body, what, limit=_MAX_BYTES)

    def _fetch(self, path: str) -> tuple[int, bytes]:
        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UsageError(f"{self.base_url!r} is not an http or https URL")
        prefix = url.path.rstrip("/").removesuffix("/v1")
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection = self._connection(url.scheme, url.hostname, url.port)
            try:
                connection.connect()
                self._note_key(connection)
                connection.request("GET", prefix + path, headers=headers)
                response = connection.getresponse()
                body = response.read(_MAX_BYTES + 1)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise AttestationUnavailable(
                f"{url.hostname} does not answer: {e}", hint="is it an endpoint of `veriattn serve`?"
            ) from None
        if len(body) > _MAX_BYTES:
            raise AttestationUnavailable(f"the server's answer is larger than {_MAX_BYTES} bytes")
        return response.status, body

    def _connection(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self.timeout_s)
        if self.certificate_pem is not None:
            context = pinned_context(self.certificate_pem)
        else:
            context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
        return http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=context)

    def _note_key(self, connection: http.client.HTTPConnection) -> None:
        if not isinstance(connection.sock, ssl.SSLSocket):
            return
        der = connection.sock.getpeercert(binary_form=True)
        if der is None:
            raise AttestationError("the server has no TLS certificate")
        spki = spki_sha256(der)
        if self.tls_spki_sha256 not in (None, spki):
            raise AttestationError("the server changed its TLS key between two requests")
        self.tls_spki_sha256 = spki


def fetch_collateral(evidence: Json, url: str | None = None) -> str:
    """Intel's collateral for a TDX quote, from Intel's service or another PCCS. Raises: AttestationUnavailable."""
    import dcap_qvl  # noqa: PLC0415 - an extra

    async def fetch() -> str:
        found = await (dcap_qvl.get_collateral(url, quote) if url else dcap_qvl.get_collateral_from_pcs(quote))
        return str(found.to_json())

    quote = hex_field(evidence, "quote", MAX_QUOTE_BYTES)
    try:
        return asyncio.run(fetch())
    except (ValueError, OSError, RuntimeError) as e:
        raise AttestationUnavailable(f"no collateral to be had: {' '.join(str(e).split())[:200]}") from None
