"""Signing keys of a server, the key set that a quote vouches for, and the statement that binds one to the other."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from veriattn.attest.canonical import Json, canonical, digest_of
from veriattn.errors import AttestationError, UsageError

ALGORITHM = "ed25519"
PURPOSE = "aci.report_data.v1"
NONCE_PATTERN = re.compile(r"[0-9a-f]{64}")
DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")


def check_nonce(nonce: object) -> str:
    """64 lowercase hexadecimal digits, or UsageError."""
    if not isinstance(nonce, str) or not NONCE_PATTERN.fullmatch(nonce):
        raise UsageError("a nonce is 64 lowercase hexadecimal digits", hint="draw 32 random bytes for each request")
    return nonce


def report_data(keyset_digest: str, nonce: str | None) -> bytes:
    """The 64 bytes that a quote must carry: SHA-256 of the canonical statement, then 32 zero bytes.

    Without a nonce the statement holds null: such a quote binds the keys but may be old.
    """
    statement = {"keyset_digest": keyset_digest, "nonce": nonce, "purpose": PURPOSE}
    return hashlib.sha256(canonical(statement)).digest() + bytes(32)


@dataclass(frozen=True)
class TlsKey:
    """A TLS key that terminates inside the TEE: SHA-256 of its SubjectPublicKeyInfo, and the name it serves."""

    spki_sha256: str
    domain: str

    def to_json(self) -> Json:
        return {"spki_sha256": self.spki_sha256, "domain": self.domain}


class SigningKey:
    """An Ed25519 key that exists only in this process's memory."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        raw = self._key.public_key().public_bytes_raw()
        self.public_hex = raw.hex()
        self.key_id = "receipt-" + hashlib.sha256(raw).hexdigest()[:16]

    def sign(self, message: bytes) -> str:
        """The Ed25519 signature in hexadecimal digits."""
        return self._key.sign(message).hex()

    def to_json(self) -> Json:
        return {"key_id": self.key_id, "algo": ALGORITHM, "public_key": self.public_hex}

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"


def signature_holds(public_hex: str, message: bytes, signature_hex: str) -> bool:
    """Whether an Ed25519 signature is right. Malformed keys and signatures are wrong ones."""
    if not re.fullmatch(r"[0-9a-f]{64}", public_hex) or not re.fullmatch(r"[0-9a-f]{128}", signature_hex):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex)).verify(bytes.fromhex(signature_hex), message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class KeySet:
    """The public keys of one server and the time (Unix seconds) in which receipts under them may be signed."""

    subject: str
    not_before: int
    not_after: int
    keys: tuple[tuple[str, str], ...]
    tls_keys: tuple[TlsKey, ...] = ()

    def to_json(self) -> Json:
        return {
            "subject": self.subject,
            "not_before": self.not_before,
            "not_after": self.not_after,
            "receipt_signing_keys": [{"key_id": i, "algo": ALGORITHM, "public_key": k} for i, k in self.keys],
            "tls_public_keys": [k.to_json() for k in self.tls_keys],
        }

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def public_key(self, key_id: str) -> str | None:
        """The public key of this id in hexadecimal digits, None where there is none."""
        return dict(self.keys).get(key_id)

    @classmethod
    def from_json(cls, data: object) -> KeySet:
        """Parse an untrusted key set; unknown members are refused, so that nothing rides along.

        Raises: AttestationError.
        """

        def need(ok: bool, what: str) -> None:
            if not ok:
                raise AttestationError(f"key set: {what}")

        if not isinstance(data, dict):
            raise AttestationError("key set: not an object")
        names = {"subject", "not_before", "not_after", "receipt_signing_keys", "tls_public_keys"}
        need(set(data) == names, "missing or unknown members")
        need(isinstance(data["subject"], str), "subject")
        for name in ("not_before", "not_after"):
            need(type(data[name]) is int and data[name] >= 0, name)
        keys = _entries(data["receipt_signing_keys"], ("key_id", "algo", "public_key"))
        need(keys is not None and len(keys) > 0, "receipt_signing_keys")
        pairs = []
        for key in keys or ():
            need(key["algo"] == ALGORITHM, f"a key's algorithm is not {ALGORITHM}")
            need(re.fullmatch(r"[0-9a-f]{64}", key["public_key"]) is not None, "a public key is not 32 bytes of hex")
            pairs.append((key["key_id"], key["public_key"]))
        need(len({i for i, _ in pairs}) == len(pairs), "a key id occurs twice")
        tls = _entries(data["tls_public_keys"], ("spki_sha256", "domain"))
        need(tls is not None, "tls_public_keys")
        tls_keys = tuple(TlsKey(t["spki_sha256"], t["domain"]) for t in tls or ())
        return cls(data["subject"], data["not_before"], data["not_after"], tuple(pairs), tls_keys)


def _entries(value: object, names: Sequence[str]) -> list[dict[str, Any]] | None:
    if not isinstance(value, list) or len(value) > 64:
        return None
    for item in value:
        if not isinstance(item, dict) or set(item) != set(names) or not all(isinstance(v, str) for v in item.values()):
            return None
    return value
