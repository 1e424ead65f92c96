"""Receipts kept for a while, for the caller that made the request; encrypted and authenticated where they touch a disk.

The guest's disk belongs to the host. On it lie AES-256-GCM records, each bound to its receipt id, so that the host can
delete them but neither read, change nor swap them. The key lives in this process unless one is given; without one, what
an earlier process left is unreadable and removed.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from veriattn.attest.canonical import Json, canonical, parse_object
from veriattn.errors import AttestationError, ConfigError, ReceiptNotFound

_ID = re.compile(r"rcpt-[0-9a-f]{32}")
_SUFFIX = ".receipt"
_AAD = b"veriattn/receipt-store/1:"


@dataclass(frozen=True)
class _Entry:
    owner: str
    chat_id: str
    expires_at: float
    receipt: Json | None


class ReceiptStore:
    """At most `max_receipts` receipts for `retention_s` seconds; the oldest go first. Thread-safe.

    directory: None keeps them in memory. key: 32 bytes to read them again after a restart.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        retention_s: int = 86400,
        max_receipts: int = 100_000,
        key: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if retention_s < 1 or max_receipts < 1:
            raise ConfigError("the receipt store needs a positive retention and size")
        if key is not None and len(key) != 32:
            raise ConfigError("the receipt store's key is 32 bytes")
        self.retention_s, self._max, self._clock = retention_s, max_receipts, clock
        self._cipher = AESGCM(key or secrets.token_bytes(32))
        self._directory = directory
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._by_chat: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        if directory is not None:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._recover(directory)

    def put(self, receipt: Json, owner: str) -> None:
        """Keep a receipt for `owner`."""
        expires_at = int(self._clock()) + self.retention_s
        kept = receipt if self._directory is None else None
        if self._directory is not None:
            self._write(self._directory, receipt, owner, expires_at)
        with self._lock:
            self._add(receipt["receipt_id"], _Entry(owner, receipt["chat_id"], expires_at, kept))
            self._expire()

    def get(self, receipt_or_chat_id: str, owner: str) -> Json:
        """A receipt by its id or its response's id. Raises: ReceiptNotFound, also for another caller's receipt;
        AttestationError if the record on disk was tampered with."""
        with self._lock:
            self._expire()
            receipt_id = self._by_chat.get((owner, receipt_or_chat_id), receipt_or_chat_id)
            entry = self._entries.get(receipt_id)
        if entry is None or not secrets.compare_digest(entry.owner.encode(), owner.encode()):
            raise ReceiptNotFound("no such receipt", hint="they are kept for a while, for the key that asked")
        if entry.receipt is not None or self._directory is None:
            return dict(entry.receipt or {})
        record = self._read(self._directory / (receipt_id + _SUFFIX))
        if record is None or record["owner"] != owner:
            raise AttestationError("the stored receipt was deleted or altered on disk")
        receipt: Json = record["receipt"]
        return receipt

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._entries)

    def _add(self, receipt_id: str, entry: _Entry) -> None:
        self._entries[receipt_id] = entry
        self._by_chat[entry.owner, entry.chat_id] = receipt_id

    def _expire(self) -> None:
        now = self._clock()
        while self._entries:
            receipt_id, entry = next(iter(self._entries.items()))
            if entry.expires_at > now and len(self._entries) <= self._max:
                return
            del self._entries[receipt_id]
            if self._by_chat.get((entry.owner, entry.chat_id)) == receipt_id:
                del self._by_chat[entry.owner, entry.chat_id]
            if self._directory is not None:
                (self._directory / (receipt_id + _SUFFIX)).unlink(missing_ok=True)

    def _write(self, directory: Path, receipt: Json, owner: str, expires_at: int) -> None:
        receipt_id = receipt["receipt_id"]
        nonce = secrets.token_bytes(12)
        plain = canonical({"receipt": receipt, "owner": owner, "expires_at": expires_at})
        temporary = directory / f".{receipt_id}.part"
        temporary.write_bytes(nonce + self._cipher.encrypt(nonce, plain, _AAD + receipt_id.encode()))
        os.replace(temporary, directory / (receipt_id + _SUFFIX))

    def _read(self, path: Path) -> Json | None:
        """The record, or None if it is missing or not what was written."""
        try:
            raw = path.read_bytes()
            plain = self._cipher.decrypt(raw[:12], raw[12:], _AAD + path.name[: -len(_SUFFIX)].encode())
        except (OSError, InvalidTag, ValueError):
            return None
        return parse_object(plain, "stored receipt", limit=64 << 20)

    def _recover(self, directory: Path) -> None:
        found = []
        for path in directory.glob("*" + _SUFFIX):
            record = self._read(path) if _ID.fullmatch(path.name[: -len(_SUFFIX)]) else None
            if record is None:
                path.unlink(missing_ok=True)
                continue
            found.append((record["expires_at"], path.name[: -len(_SUFFIX)], record))
        for expires_at, receipt_id, record in sorted(found, key=lambda f: f[:2]):
            self._add(receipt_id, _Entry(record["owner"], record["receipt"]["chat_id"], expires_at, None))
        self._expire()
