"""Canonical JSON (RFC 8785) over strings, integers, booleans, null, arrays and objects: one byte string per value.

Fractions are written as strings (`decimal_text`), integers beyond 2**53 - 1 too: what is signed must not depend on
how a language prints a float.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

import rfc8785

from veriattn.errors import AttestationError

Json = dict[str, Any]

MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 16


def _check(value: object, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise AttestationError("canonical JSON: nested too deeply")
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise AttestationError("canonical JSON: an integer beyond 2**53 - 1", hint="write it as a string")
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise AttestationError("canonical JSON: a member name that is not a string")
            _check(item, depth + 1)
    else:
        raise AttestationError(f"canonical JSON: {type(value).__name__} is not allowed", hint="write it as a string")


def canonical(value: object) -> bytes:
    """The one UTF-8 encoding of a value.

    Raises: AttestationError for floats, large integers, lone surrogates and deep nesting.
    """
    _check(value)
    try:
        return rfc8785.dumps(value)  # type: ignore[arg-type]
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as e:
        raise AttestationError(f"canonical JSON: {e}") from None


def sha256_text(data: bytes) -> str:
    """A digest as ACI writes it: `sha256:` and 64 lowercase hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of(value: object) -> str:
    """Digest of the canonical form."""
    return sha256_text(canonical(value))


def decimal_text(number: float) -> str:
    """Shortest decimal text that reads back as the same binary64; integers without a fraction."""
    return str(int(number)) if number == int(number) and abs(number) < 2**53 else repr(float(number))


def plain(value: object) -> Any:
    """A JSON-like value in the form that `canonical` takes: floats become `decimal_text`, large integers text."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if abs(value) <= MAX_INTEGER else str(value)
    if isinstance(value, float):
        return decimal_text(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise AttestationError("JSON: a member name occurs twice")
    return out


def _no_float(text: str) -> NoReturn:
    raise AttestationError(f"JSON: the number {text[:40]} is not an integer")


def parse_object(raw: bytes, what: str, limit: int = 4 << 20) -> Json:
    """Parse an untrusted JSON object strictly. Raises: AttestationError naming `what`."""
    if len(raw) > limit:
        raise AttestationError(f"{what}: larger than {limit} bytes")
    try:
        value = json.loads(raw, object_pairs_hook=_no_duplicates, parse_float=_no_float, parse_constant=_no_float)
        if not isinstance(value, dict):
            raise AttestationError("not a JSON object")
        _check(value)
    except (ValueError, RecursionError):
        raise AttestationError(f"{what}: not JSON") from None
    except AttestationError as e:
        raise AttestationError(f"{what}: {e.message}", hint=e.hint) from None
    return value
