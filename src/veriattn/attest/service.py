"""The server's side of receipts: keys, quotes over them, issuing and handing out."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from veriattn.attest import receipts
from veriattn.attest.canonical import Json
from veriattn.attest.keys import KeySet, SigningKey, TlsKey, check_nonce, report_data
from veriattn.attest.providers import TEST_WARNING, QuoteCache, QuoteProvider
from veriattn.attest.store import ReceiptStore
from veriattn.errors import ConfigError, ReceiptNotFound, UsageError


class ReceiptService:
    """Issues receipts under keys that exist only in this process. Thread-safe.

    Keys: one signing key at a time, valid for `key_lifetime_s`; it is replaced by a fresh one when `rotate_before_s` of
    that are left, or on `rotate()`, and its private half is dropped. Key sets of the past stay attestable until their
    receipts have expired, so that an older receipt can still be checked.

    Trust: request and response bytes must be what went over the socket inside the TEE; the event must tell the truth.
    """

    def __init__(
        self,
        provider: QuoteProvider,
        *,
        subject: str = "veriattn",
        tls_keys: Sequence[TlsKey] = (),
        store: ReceiptStore | None = None,
        key_lifetime_s: int = 7 * 86400,
        rotate_before_s: int = 86400,
        quotes: QuoteCache | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < rotate_before_s < key_lifetime_s:
            raise ConfigError("rotate_before_s must be positive and below key_lifetime_s")
        self._subject, self._tls_keys, self._clock = subject, tuple(tls_keys), clock
        self._lifetime_s, self._rotate_before_s = key_lifetime_s, rotate_before_s
        self.store = ReceiptStore() if store is None else store
        self._quotes = QuoteCache(provider) if quotes is None else quotes
        self.provider_name = provider.name
        self._lock = threading.Lock()
        self._past: list[KeySet] = []
        self._key, self._keyset = self._fresh()

    def _fresh(self) -> tuple[SigningKey, KeySet]:
        now = int(self._clock())
        key = SigningKey()
        pairs = ((key.key_id, key.public_hex),)
        return key, KeySet(self._subject, now, now + self._lifetime_s, pairs, self._tls_keys)

    def rotate(self, tls_keys: Sequence[TlsKey] | None = None) -> str:
        """Replace the signing key, and the TLS keys if given. Returns the new key set's digest."""
        with self._lock:
            if tls_keys is not None:
                self._tls_keys = tuple(tls_keys)
            self._replace()
            return self._keyset.digest

    def _replace(self) -> None:
        now = self._clock()
        kept = self.store.retention_s
        self._past = [k for k in [*self._past, self._keyset] if k.not_after + kept > now]
        self._key, self._keyset = self._fresh()

    def _current(self) -> tuple[SigningKey, KeySet]:
        with self._lock:
            if self._clock() >= self._keyset.not_after - self._rotate_before_s:
                self._replace()
            return self._key, self._keyset

    def keyset_digest(self) -> str:
        """Digest of the current key set, for the X-ACI-Keyset-Digest header."""
        return self._current()[1].digest

    def keyset(self) -> KeySet:
        """The current key set."""
        return self._current()[1]

    def attestation(self, nonce: str | None, keyset_digest: str | None = None) -> Json:
        """The attestation report for a client's nonce, over the current key set or an earlier one by its digest.

        Without a nonce the report shows that the keys are bound, not that it is fresh.

        Raises: UsageError for a nonce that is not 64 lowercase hexadecimal digits or an unknown key set;
        AttestationBusy (HTTP 429) and AttestationUnavailable (HTTP 503) where no quote can be had.
        """
        if nonce is not None:
            check_nonce(nonce)
        _, keyset = self._current()
        if keyset_digest is not None and keyset_digest != keyset.digest:
            with self._lock:
                past = [k for k in self._past if k.digest == keyset_digest]
            if not past:
                raise UsageError("no key set of that digest", hint="leave keyset_digest out for the current one")
            keyset = past[0]
        data = report_data(keyset.digest, nonce)
        evidence = self._quotes.evidence(data)
        return {
            "api_version": receipts.API_VERSION,
            "nonce": nonce,
            "workload_keyset_digest": keyset.digest,
            "attestation": {
                "tee_type": self.provider_name,
                "workload_keyset": keyset.to_json(),
                "report_data": data.hex(),
                "evidence": evidence,
            },
            **({"warning": TEST_WARNING} if self.provider_name == "test" else {}),
        }

    def new_receipt_id(self) -> str:
        """An id to announce in the X-Receipt-Id header before a stream begins; pass it to `issue` when it has ended."""
        return receipts.new_id("rcpt-", secrets.token_bytes(32))

    def issue(
        self,
        request_bytes: bytes,
        response_bytes: bytes | None,
        event: Json,
        api_key_id: str,
        chat_id: str,
        *,
        receipt_id: str | None = None,
        model: str = "",
        endpoint: str = "/v1/chat/completions",
        response_sha256: str | None = None,
    ) -> Json:
        """Sign and keep the receipt of a finished response.

        request_bytes, response_bytes: the raw bodies; of a stream everything, with the `data:` framing and `[DONE]`. A
        stream that was hashed as it went passes response_bytes None and the hex digest. event: `verification_event`.

        Raises: UsageError if neither or both of response_bytes and response_sha256 are given; AttestationError for an
        event that canonical JSON cannot hold.
        """
        if (response_bytes is None) == (response_sha256 is None):
            raise UsageError("issue needs either response_bytes or response_sha256")
        if response_sha256 is None:
            response_sha256 = hashlib.sha256(response_bytes or b"").hexdigest()
        key, keyset = self._current()
        receipt = receipts.build(
            key=key,
            keyset_digest=keyset.digest,
            receipt_id=receipt_id or self.new_receipt_id(),
            chat_id=chat_id,
            model=model,
            endpoint=endpoint,
            served_at=int(self._clock()),
            request_sha256="sha256:" + hashlib.sha256(request_bytes).hexdigest(),
            response_sha256="sha256:" + response_sha256,
            event=event,
        )
        receipts.parse(receipt)
        self.store.put(receipt, api_key_id)
        return receipt

    def get(self, receipt_or_chat_id: str, api_key_id: str) -> Json:
        """A receipt, for the API key that made the request. Raises: ReceiptNotFound."""
        return self.store.get(receipt_or_chat_id, api_key_id)

    def signature(self, chat_id: str, api_key_id: str, signing_algo: str = "ed25519") -> Json:
        """The short form of `/v1/signature/{chat_id}`: a signature over `request:response` hashes in hex.

        Only while the key that signed the receipt is the current one; the receipt itself outlives it.
        Raises: UsageError for another algorithm; ReceiptNotFound.
        """
        if signing_algo != "ed25519":
            raise UsageError(f"signing_algo {signing_algo!r} is not supported", hint="ed25519 is")
        parsed = receipts.parse(self.get(chat_id, api_key_id))
        key, _ = self._current()
        if key.key_id != parsed.key_id:
            raise ReceiptNotFound("the key of that response was replaced", hint="fetch the receipt, which is signed")
        text = f"{parsed.request_sha256[7:]}:{parsed.response_sha256[7:]}"
        return {
            "text": text,
            "signature": key.sign(text.encode("ascii")),
            "signing_address": key.public_hex,
            "signing_algo": "ed25519",
        }
