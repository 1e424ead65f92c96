"""A receipt in a file with all that its check needs: raw bytes, nonces, the attestation report."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path

from veriattn.attest.canonical import Json, parse_object
from veriattn.errors import AttestationError, ModelError

FORMAT = "veriattn-receipt-bundle/1"
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Bundle:
    """What a client keeps of one response.

    Trust: receipt, attestation and response come from the server. The request and the nonces are the client's own; in a
    bundle that somebody else made they are that person's word, and say nothing about freshness.
    """

    receipt: Json
    attestation: Json | None = None
    request: bytes | None = None
    response: bytes | None = None
    client_nonce: str | None = None
    attestation_nonce: str | None = None

    def to_json(self) -> Json:
        return {
            "format": FORMAT,
            "receipt": self.receipt,
            "attestation": self.attestation,
            "request_base64": _encode(self.request),
            "response_base64": _encode(self.response),
            "client_nonce": self.client_nonce,
            "attestation_nonce": self.attestation_nonce,
        }

    def save(self, path: str | Path) -> None:
        """Write the file, readable by its owner only: it holds prompt and answer. Raises: ModelError."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as f:
                json.dump(self.to_json(), f, indent=1, sort_keys=True)
                f.write("\n")
            temporary.replace(path)
        except OSError as e:
            raise ModelError(f"cannot write {path}: {e.strerror}", hint="is there room, may you write there?") from None

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read a bundle, or a bare receipt. Raises: ModelError where there is no file, AttestationError for damage."""
        data = parse_object(read_file(path), f"{path}", limit=_MAX_BYTES)
        if data.get("format") != FORMAT:
            return cls(data)
        receipt, attestation = data.get("receipt"), data.get("attestation")
        if not isinstance(receipt, dict) or not isinstance(attestation, dict | None):
            raise AttestationError(f"{path}: the bundle holds no receipt, or a damaged report")
        return cls(
            receipt,
            attestation,
            _decode(data.get("request_base64"), "request_base64"),
            _decode(data.get("response_base64"), "response_base64"),
            _text(data.get("client_nonce"), "client_nonce"),
            _text(data.get("attestation_nonce"), "attestation_nonce"),
        )


def read_file(path: str | Path) -> bytes:
    """A whole file of bounded size. Raises: ModelError."""
    try:
        with Path(path).open("rb") as f:
            raw = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise ModelError(f"cannot read {path}: {e.strerror}", hint="name a file that you may read") from None
    if len(raw) > _MAX_BYTES:
        raise ModelError(f"{path} is larger than {_MAX_BYTES} bytes")
    return raw


def _encode(raw: bytes | None) -> str | None:
    return None if raw is None else base64.b64encode(raw).decode("ascii")


def _decode(value: object, name: str) -> bytes | None:
    text = _text(value, name)
    try:
        return None if text is None else base64.b64decode(text, validate=True)
    except ValueError:
        raise AttestationError(f"the bundle's {name} is not base64") from None


def _text(value: object, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise AttestationError(f"the bundle's {name} is not text")
    return value
