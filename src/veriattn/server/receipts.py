"""What the server asks of receipts and attestation; `veriattn.attest` implements it."""

from __future__ import annotations

from typing import Any, Protocol


class ReceiptService(Protocol):
    """Signs one receipt per response and says whose key signs them.

    Thread-safety: the server calls it from worker threads, one call at a time per response.
    """

    def keyset_digest(self) -> str:
        """Digest of the key set in force, for the `X-ACI-Keyset-Digest` header."""
        ...

    def new_receipt_id(self) -> str:
        """An unguessable id; a stream names it in its headers, before its receipt exists."""
        ...

    def attestation(self, nonce: str | None) -> dict[str, Any]:
        """The attestation report, bound to `nonce` (64 lowercase hex digits, checked by the caller) where one is given.

        Raises: AttestationError (no quote to be had, or too many asked for: code `attestation_rate_limited`).
        """
        ...

    def issue(self, request_bytes: bytes, response_bytes: bytes, event: dict[str, Any]) -> dict[str, Any]:
        """Sign and store the receipt of a response that has ended.

        request_bytes, response_bytes: the raw bodies; of a stream, all of its framing.
        event: `receipt_id`, `chat_id`, `api_key_id` (whom it may be given to), `request_id`, `endpoint`, `nonce` (the client's,
        or None), `served_at` (Unix seconds), `gpu_verified` (the check's own event), `not_verified` (list of names),
        `model` {name, digest, spec_version}, `sampling` (effective parameters with seed), `choices` (prompt and output
        token ids of each), `config_digest`. Values are strings, integers, lists and objects; numbers with a fraction come as strings.
        """
        ...

    def get(self, receipt_or_chat_id: str, api_key_id: str) -> dict[str, Any] | None:
        """The stored receipt, or None where there is none for this key."""
        ...
