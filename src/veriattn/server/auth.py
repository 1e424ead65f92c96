"""API keys: hashed at rest, with validity windows and quotas."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veriattn.errors import ConfigError
from veriattn.server.errors import ApiError

PREFIX = "va-"
ANONYMOUS = "anonymous"
_MINUTE_S, _DAY_S = 60.0, 86400.0


@dataclass(frozen=True)
class KeyEntry:
    """One API key as stored. Quotas of 0 mean none. A key being rotated out has `not_after`, its successor the same `id`."""

    id: str
    sha256: str
    not_before: float = 0.0
    not_after: float = math.inf
    requests_per_minute: int = 0
    tokens_per_day: int = 0
    concurrent_requests: int = 0


@dataclass
class _Bucket:
    """Use of one id: a token bucket for requests, a window of a day for tokens, requests in progress."""

    requests: float = 0.0
    requests_at: float = 0.0
    tokens: int = 0
    tokens_since: float = field(default=-math.inf)
    active: int = 0


def new_key() -> tuple[str, str]:
    """A fresh key of 256 random bits and its SHA-256, which is all that is stored: such keys cannot be guessed from it."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """What is stored of an API key. The keys are random, so a plain hash will do."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _moment(value: object, where: str) -> float:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    raise ConfigError(f"{where} must be a date and time, such as 2026-12-31T00:00:00Z")


def read_keys(path: Path) -> list[KeyEntry]:
    """Parse a keys file: `[[key]]` tables. Raises: ConfigError."""
    try:
        status = path.stat()
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from None
    # The owner's group may be the owner alone; everybody is everybody, a prover under a user of its own among them.
    if status.st_mode & 0o002 or (status.st_mode & 0o020 and os.geteuid() != status.st_uid):
        raise ConfigError(f"{path} can be written by others", hint=f"chmod go-w {path}")
    entries: list[KeyEntry] = []
    tables = data.get("key", [])
    if set(data) - {"key"} or not isinstance(tables, list):
        raise ConfigError(f"{path} holds something other than [[key]] tables")
    for i, table in enumerate(tables):
        entries.append(_entry(table, f"{path}, key {i}"))
    if len({e.sha256 for e in entries}) != len(entries):
        raise ConfigError(f"{path} names a key twice")
    return entries


def _entry(table: Any, where: str) -> KeyEntry:
    known = set(KeyEntry.__dataclass_fields__)
    if not isinstance(table, dict) or set(table) - known:
        raise ConfigError(f"{where}: known fields are {', '.join(sorted(known))}")
    values = dict(table)
    ident, digest = values.get("id"), values.get("sha256")
    if not isinstance(ident, str) or not ident or ident == ANONYMOUS:
        raise ConfigError(f"{where}: id must be a name other than {ANONYMOUS!r}")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ConfigError(f"{where}: sha256 must be 64 lowercase hex digits", hint="`veriattn api-key` makes the line")
    for name in ("not_before", "not_after"):
        if name in values:
            values[name] = _moment(values[name], f"{where}: {name}")
    for name in ("requests_per_minute", "tokens_per_day", "concurrent_requests"):
        if type(values.get(name, 0)) is not int or values.get(name, 0) < 0:
            raise ConfigError(f"{where}: {name} must be a whole number, 0 for none")
    return KeyEntry(**values)


class KeyStore:
    """Who may call, and how much. Used from the event loop alone.

    Looking a key up by its hash leaks no timing about the key: an attacker does not control the hash.
    """

    def __init__(self, path: Path | None, *, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = path, now
        self._by_hash: dict[str, KeyEntry] = {}
        self._buckets: dict[str, _Bucket] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again (SIGHUP). Raises: ConfigError; the keys before stay in force."""
        if self._path is not None:
            self._by_hash = {e.sha256: e for e in read_keys(self._path)}

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return self._path is None

    def authenticate(self, authorization: str | None) -> KeyEntry:
        """The entry of `Bearer KEY`. Raises: ApiError 401."""
        if self.open:
            return KeyEntry(ANONYMOUS, "")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "no API key was given; send it as 'Authorization: Bearer KEY'", "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        entry = self._by_hash.get(hash_key(key.strip()))
        now = self._now()
        if entry is None or not entry.not_before <= now < entry.not_after:
            raise ApiError(
                401, "this API key is unknown or not valid at this time", "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return entry

    def charge_request(self, entry: KeyEntry) -> None:
        """Count a request, which `end_request` must follow. Raises: ApiError 429 with Retry-After when a quota is used up."""
        now = self._now()
        bucket = self._buckets.setdefault(entry.id, _Bucket(float(entry.requests_per_minute), now))
        if entry.concurrent_requests and bucket.active >= entry.concurrent_requests:
            raise _over("requests of this API key at a time", 1)
        if entry.tokens_per_day:
            if now - bucket.tokens_since >= _DAY_S:
                bucket.tokens, bucket.tokens_since = 0, now
            if bucket.tokens >= entry.tokens_per_day:
                raise _over("tokens of this API key for the day", bucket.tokens_since + _DAY_S - now)
        rate = entry.requests_per_minute
        if rate:
            refill = max(0.0, now - bucket.requests_at) * rate / _MINUTE_S
            bucket.requests, bucket.requests_at = min(float(rate), bucket.requests + refill), now
            if bucket.requests < 1:
                raise _over("requests of this API key for the minute", (1 - bucket.requests) * _MINUTE_S / rate)
            bucket.requests -= 1
        bucket.active += 1

    def end_request(self, entry: KeyEntry, tokens: int) -> None:
        """A request that was counted is over; tokens were computed for it."""
        if bucket := self._buckets.get(entry.id):
            bucket.active -= 1
            bucket.tokens += tokens


def _over(what: str, wait_s: float) -> ApiError:
    return ApiError(
        429, f"the {what} are used up", "rate_limit_exceeded", headers={"Retry-After": str(max(1, math.ceil(wait_s)))}
    )
