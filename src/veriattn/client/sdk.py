"""A thin wrapper around the OpenAI SDK that keeps raw bytes, sends nonces, and checks receipts.

Works with SDK 2.x (httpx) and 3.x (httpx2): whichever HTTP library the installed SDK is built on is used.
"""

from __future__ import annotations

import importlib
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from veriattn.attest.canonical import Json
from veriattn.attest.policy import Policy
from veriattn.attest.quotes import production_verifiers
from veriattn.attest.receipts import NONCE_HEADER, RECEIPT_HEADER
from veriattn.attest.verify import Expectations, ReceiptVerifier, Verification
from veriattn.client.bundle import Bundle
from veriattn.client.remote import Remote, pinned_context, spki_sha256
from veriattn.client.tls import attested_certificate
from veriattn.errors import AttestationError, UsageError

_GENERATION_PATHS = ("/chat/completions", "/completions")


@dataclass
class Exchange:
    """One request and its response, as bytes. `ended` says that the HTTP body was read to its end; `tls_spki_sha256` is the
    hash of the key at the other end of its own connection, None without TLS; `status` that of HTTP."""

    request: bytes
    nonce: str
    receipt_id: str | None = None
    chunks: list[bytes] = field(default_factory=list, repr=False)
    ended: bool = False
    tls_spki_sha256: str | None = None
    status: int = 200

    @property
    def complete(self) -> bool:
        """Whether all of the response is here. The SDK stops reading a stream at `[DONE]`, which is its last event."""
        return self.ended or self.response.endswith(b"data: [DONE]\n\n")

    @property
    def response(self) -> bytes:
        return b"".join(self.chunks)

    def may_bear(self, name: str) -> bool:
        """Whether whoever reads the response may take this for its id, or for that of its receipt.

        Trust: the response is adversarial, and the SDK's reading of odd bytes may be another than ours: all that is not
        laid out as `veriattn serve` does it may bear any name.
        """
        return name == self.receipt_id or not {name, None}.isdisjoint(_ids(self.response, self.ended))


def _ids(raw: bytes, ended: bool) -> set[str | None]:
    """The ids in a whole response or in the events of a stream; with None where that cannot be told."""
    with suppress(ValueError, RecursionError):
        whole = json.loads(raw)  # as the SDK's HTTP library does it
        return {_id(whole)}
    *events, rest = raw.split(b"\n\n")
    # Of a stream that was left the SDK has read whole events, but may know other ends of events.
    cut = not ended and set(rest.removesuffix(b"\n")).isdisjoint(b"\r\n")
    ids: set[str | None] = {None} if rest and not cut else set()
    for event in events:
        if event == b"data: [DONE]":
            continue
        try:
            found = json.loads(event.removeprefix(b"data: ").decode("utf-8"))
        except (ValueError, RecursionError):
            found = None
        plain = event.startswith(b"data: ") and set(event).isdisjoint(b"\r\n")
        ids.add(_id(found) if plain else None)
    return ids


def _id(found: object) -> str | None:
    ident = found.get("id") if isinstance(found, dict) else None
    return ident if isinstance(ident, str) else None


def _connection_key(response: Any) -> str | None:
    """Hash of the key at the other end of a response's connection."""
    stream = response.extensions.get("network_stream")
    tls = None if stream is None else stream.get_extra_info("ssl_object")
    der = None if tls is None else tls.getpeercert(True)  # by place: it may be the inner object of the ssl module
    return None if der is None else spki_sha256(der)


def http_library(openai: ModuleType) -> ModuleType:
    """The HTTP library that an OpenAI SDK is built on: httpx2 for 3.x, httpx before. Raises: UsageError."""
    for base in openai.DefaultHttpxClient.__mro__:
        name = base.__module__.partition(".")[0]
        if name in ("httpx", "httpx2"):
            return importlib.import_module(name)
    raise UsageError("this version of the OpenAI SDK is built on an unknown HTTP library", hint="2.x and 3.x work")


def capturing_transport(library: ModuleType, inner: Any, keep: Callable[[Exchange], None]) -> Any:
    """A transport of `library` that sends through `inner`, adds a nonce to each generation and keeps what passes."""

    class Captured(library.SyncByteStream):  # type: ignore[misc,name-defined]
        def __init__(self, stream: Any, exchange: Exchange) -> None:
            self._stream, self._exchange = stream, exchange

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                self._exchange.chunks.append(bytes(chunk))
                yield chunk
            self._exchange.ended = True

        def close(self) -> None:
            self._stream.close()

    class Transport(library.BaseTransport):  # type: ignore[misc,name-defined]
        def handle_request(self, request: Any) -> Any:
            if request.method != "POST" or not request.url.path.endswith(_GENERATION_PATHS):
                return inner.handle_request(request)
            nonce = request.headers.get(NONCE_HEADER) or secrets.token_hex(32)
            request.headers[NONCE_HEADER] = nonce
            # What is hashed in the TEE is what it sends; a proxy that compresses must be told not to.
            request.headers["Accept-Encoding"] = "identity"
            exchange = Exchange(request.read(), nonce)
            response = inner.handle_request(request)
            exchange.receipt_id = response.headers.get(RECEIPT_HEADER)
            exchange.tls_spki_sha256, exchange.status = _connection_key(response), response.status_code
            keep(exchange)
            response.stream = Captured(response.stream, exchange)
            return response

        def close(self) -> None:
            inner.close()

    return Transport()


class VerifiedOpenAI:
    """`openai` is an ordinary OpenAI client; afterwards `verify` checks the receipt of what it received.

        client = VerifiedOpenAI("https://host/v1", api_key, policy=Policy.load(path), model_digests=[digest])
        answer = client.openai.chat.completions.create(model="m", messages=[...])
        client.verify(answer).require()

    `attested` connects to servers whose TLS certificate is vouched for by their quote instead of an authority, and sends
    nothing before the quote has been verified.

    policy: without one nothing can be verified (measurements must be pinned). model_digests: accepted models, beside the
    policy's. keep: how many exchanges are remembered. attestation_max_age_s: how long a report on a nonce of this client
    serves for receipts under its key set. transport: what to send through, of the SDK's HTTP library.

    Trust: the answer is in the caller's hands before `verify` is called. Call it before you act on it.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        policy: Policy | None = None,
        model_digests: tuple[str, ...] | list[str] = (),
        collateral: str | None = None,
        remote: Remote | None = None,
        keep: int = 64,
        attestation_max_age_s: float = 600.0,
        transport: Any = None,
        verifier: ReceiptVerifier | None = None,
        clock: Callable[[], float] = time.time,
        **openai_options: Any,
    ) -> None:
        import openai  # noqa: PLC0415 - an extra

        library = http_library(openai)
        policy = policy or Policy()
        self._verifier = verifier or ReceiptVerifier(production_verifiers(policy))
        self._digests = (*policy.model_digests, *model_digests)
        self._min_bits, self._collateral, self._clock = policy.min_soundness_bits, collateral, clock
        self._remote = remote or Remote(base_url, api_key)
        self._exchanges: deque[Exchange] = deque(maxlen=keep)
        self._reports: dict[str, tuple[float, str, Json]] = {}
        self._max_age_s = attestation_max_age_s
        self.last: Exchange | None = None
        inner = transport if transport is not None else library.HTTPTransport()
        self._http = library.Client(
            transport=capturing_transport(library, inner, self._remember),
            timeout=openai_options.pop("timeout", 600.0),
        )
        self.openai = openai.OpenAI(base_url=base_url, api_key=api_key, http_client=self._http, **openai_options)

    @classmethod
    def attested(
        cls,
        base_url: str,
        api_key: str,
        *,
        policy: Policy,
        collateral: str | None = None,
        verifier: ReceiptVerifier | None = None,
        clock: Callable[[], float] = time.time,
        **options: Any,
    ) -> VerifiedOpenAI:
        """A client whose TLS ends inside a verified TEE (`client.tls.attested_certificate`). Raises: AttestationError."""
        import openai  # noqa: PLC0415 - an extra

        verifier = verifier or ReceiptVerifier(production_verifiers(policy))
        expect = Expectations(now=int(clock()), collateral=collateral)
        pem = attested_certificate(base_url, verifier, expect)
        return cls(
            base_url,
            api_key,
            policy=policy,
            collateral=collateral,
            verifier=verifier,
            clock=clock,
            remote=Remote(base_url, api_key, certificate_pem=pem),
            transport=http_library(openai).HTTPTransport(verify=pinned_context(pem)),
            **options,
        )

    def _remember(self, exchange: Exchange) -> None:
        self.last = exchange
        if 200 <= exchange.status < 300:  # of the others the SDK makes no answer
            self._exchanges.append(exchange)

    def bundle(self, of: Any = None) -> Bundle:
        """Everything that a check needs, fetched and ready to be saved.

        of: an answer of the SDK, a receipt id, a response's id, an `Exchange`, or None for the last exchange.
        Raises: UsageError for a stream that was not read to its end or an unknown exchange; ReceiptNotFound and
        AttestationUnavailable where the server does not give what it should; AttestationError where several responses
        bear the same id.
        """
        return self._bundle(self._find(of))

    def _bundle(self, exchange: Exchange) -> Bundle:
        if exchange.receipt_id is None:
            raise AttestationError("the response names no receipt", hint="is it an endpoint of `veriattn serve`?")
        receipt = self._remote.receipt(exchange.receipt_id)
        if not exchange.complete:
            raise UsageError("the response was not read to its end", hint="a stream's receipt exists once it has ended")
        nonce, attestation = self._attestation(str(receipt.get("workload_keyset_digest")))
        return Bundle(receipt, attestation, exchange.request, exchange.response, exchange.nonce, nonce)

    def verify(self, of: Any = None) -> Verification:
        """Fetch and check the receipt; see `bundle` for `of`. `Verification.require` raises where it does not hold."""
        exchange = self._find(of)
        bundle = self._bundle(exchange)
        expect = Expectations(
            now=int(self._clock()),
            request=bundle.request,
            response=bundle.response,
            client_nonce=bundle.client_nonce,
            attestation_nonce=bundle.attestation_nonce,
            model_digests=self._digests,
            min_soundness_bits=self._min_bits,
            collateral=self._collateral,
        )
        if bundle.attestation is not None and _names_tls_keys(bundle.attestation):
            # Of the connection that carried prompt and answer; what fetched the receipt may have gone another way.
            same = exchange.tls_spki_sha256 == self._remote.tls_spki_sha256
            expect = replace(
                expect, tls_spki_sha256=(exchange.tls_spki_sha256 if same else None) or "no TLS, or two keys"
            )
        return self._verifier.verify(bundle.receipt, bundle.attestation, expect)

    def _attestation(self, claimed_keyset: str) -> tuple[str, Json]:
        """A nonce of this client and the report over it, asked for once in a while for each key set: quotes are slow."""
        kept = self._reports.get(claimed_keyset)
        if kept is None or self._clock() - kept[0] > self._max_age_s:
            nonce = secrets.token_hex(32)
            kept = (self._clock(), nonce, self._remote.attestation(nonce, claimed_keyset))
            self._reports = {k: r for k, r in self._reports.items() if self._clock() - r[0] <= self._max_age_s}
            self._reports[claimed_keyset] = kept
        return kept[1:]

    def _find(self, of: Any) -> Exchange:
        """The exchange that an answer came with: found by what we received, never by what a receipt says of itself."""
        if of is None or isinstance(of, Exchange):
            exchange = of or self.last
            if exchange is None:
                raise UsageError("there was no exchange yet")
            return exchange
        name = of if isinstance(of, str) else getattr(of, "id", None)
        if not isinstance(name, str):
            raise UsageError(f"{type(of).__name__} is neither an answer nor an id")
        found = [e for e in self._exchanges if e.may_bear(name)]
        if not found:
            self._remote.receipt(name)
            raise UsageError("that exchange is not remembered", hint="raise `keep`, or verify sooner")
        if len(found) > 1:
            # Ids are drawn at random in the TEE: somebody has put one's on another, so that it passes for it.
            raise AttestationError("several responses may bear that id", hint="verify each `Exchange` by itself")
        return found[0]

    def close(self) -> None:
        """Close the connections."""
        self.openai.close()

    def __enter__(self) -> VerifiedOpenAI:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _names_tls_keys(attestation: Json) -> bool:
    inner = attestation.get("attestation")
    keyset = inner.get("workload_keyset") if isinstance(inner, dict) else None
    return isinstance(keyset, dict) and bool(keyset.get("tls_public_keys"))
