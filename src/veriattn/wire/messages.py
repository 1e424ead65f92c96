"""Wire messages between verifier and prover: header, kinds, payload structs, limits, encoders and decoders.

`docs/wire.md` is the normative text. Two kinds of decoder live here. Those that the *prover* uses on messages of the
verifier check every field against `Limits`. Those that the *verifier* uses on messages of the prover read fixed-size
payloads only: on that side no size, count or offset is ever taken from a message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from veriattn.errors import EXIT_PROVER, EXIT_VERIFICATION, MalformedMessage, ProverFault, VeriattnError

PROTOCOL_VERSION = 1
MAGIC = 0x31544156  # "VAT1" in little-endian bytes
HEADER = struct.Struct("<IHHQQQ")  # magic, kind, flags, session, seq, payload_bytes
HEADER_BYTES = HEADER.size
MAX_HELLO_BYTES = 65536
MAX_MODEL_PATH_CHARS = 4096
READY_BYTES = 64
ERROR_BYTES = 256

_READY = struct.Struct("<IIII48s")
_ERROR = struct.Struct("<I252s")
_STEP = struct.Struct("<QIIII")
_STEP_ENTRY = struct.Struct("<QIIII")
_U64 = struct.Struct("<Q")

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.generic]


class Kind(IntEnum):
    """Message kinds; those of the prover have bit 8 set."""

    HELLO = 1
    STEP = 2
    FREE = 3
    SHUTDOWN = 4
    LINEAR = 16  # 16 to 18: requests of single operations (wire/operations.py)
    ATTEND = 17
    WEIGHTS = 18
    SPLIT = 19  # 19 to 22: split attention (wire/split.py)
    BLOCK = 20
    NORMALISER = 21
    SHARE = 22
    LOAD = 23  # rows of a weight matrix that replace the model's (wire/operations.py)
    READY = 257
    CLAIM = 258
    LOGITS = 259
    ERROR = 260


class Mode(IntEnum):
    """What the prover answers to a STEP."""

    CLAIMS = 0
    LOGITS = 1
    OPERATIONS = 2  # of a session: no STEP, single requests instead


class AttentionCheck(IntEnum):
    """Which claims the prover sends for attention."""

    REPLAY = 0
    TRANSFER = 1


class LogitRows(IntEnum):
    """For which rows of an entry the prover computes the language-model head."""

    NONE = 0
    LAST = 1
    ALL = 2


class ErrorCode(IntEnum):
    """Why a prover gave up; informational."""

    INTERNAL = 1
    MODEL = 2
    BAD_REQUEST = 3
    OUT_OF_MEMORY = 4
    UNSUPPORTED = 5


class BadRequest(VeriattnError):
    """Prover side: a message that does not follow the wire format or the limits agreed in HELLO."""

    code = "bad_request"
    exit_code = EXIT_VERIFICATION


class VerifierGone(VeriattnError):
    """Prover side: the verifier closed its link or died; the prover ends."""

    code = "verifier_gone"
    exit_code = EXIT_PROVER


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that the verifier announces in HELLO and both sides keep.

    max_tokens_per_step: tokens over all entries of one STEP. max_sequences: entries of a STEP and live sequences.
    max_positions: a sequence never grows beyond this. kv_tokens: KV capacity over all live sequences.
    """

    max_tokens_per_step: int
    max_sequences: int
    max_positions: int
    kv_tokens: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in _LIMIT_NAMES:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**31 - 1:
                raise BadRequest(f"limit {name} is not an integer from 1 to 2^31 - 1")

    def max_payload_bytes(self, kind: int) -> int:
        """Largest payload of a message of the verifier of this kind."""
        if kind == Kind.STEP:
            return step_bytes(self.max_sequences, self.max_tokens_per_step)
        if kind == Kind.FREE:
            return 8 * self.max_sequences
        return MAX_HELLO_BYTES if kind == Kind.HELLO else 0


_LIMIT_NAMES = ("max_tokens_per_step", "max_sequences", "max_positions", "kv_tokens", "vocab_size")


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a session: what is to be run and within which limits."""

    spec: int
    session: int
    model_path: str
    model_digest: str
    mode: Mode
    limits: Limits
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Ready:
    """The prover's answer to HELLO. `pid` and `device` are what it says of itself: shown, never acted upon."""

    pid: int
    protocol: int
    spec: int
    device: str


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One sequence's share of a STEP: tokens `start .. start + num_tokens - 1` of sequence `seq_id`.

    kv_limit: how many leading positions of the sequence the prover keeps, None for all. A run lies on one side of it.
    """

    seq_id: int
    start: int
    num_tokens: int
    logits: LogitRows
    kv_limit: int | None = None

    @property
    def split(self) -> bool:
        """Whether the run lies beyond the limit, so that its attention is shared with the verifier."""
        return self.kv_limit is not None and self.start >= self.kv_limit


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over a ragged batch. token_ids_i32: (total_tokens,), entry after entry."""

    step: int
    mode: Mode
    attention_check: AttentionCheck
    entries: tuple[StepEntry, ...]
    token_ids_i32: npt.NDArray[np.int32]


def byte_view(buffer: Buffer) -> memoryview:
    """The bytes of a C-contiguous buffer, not copied."""
    view: memoryview = memoryview(cast(Any, buffer))
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def printable(raw: bytes, limit: int = 256) -> str:
    """Text from the other side made fit for a terminal: bounded, one line, no control or format characters."""
    text = raw[: 4 * limit].split(b"\0", 1)[0].decode("utf-8", "replace")
    return " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())[:limit]


def encode_header(kind: int, session: int, seq: int, payload_bytes: int) -> bytes:
    """The 32 header bytes of a message."""
    return HEADER.pack(MAGIC, kind, 0, session, seq, payload_bytes)


# -- verifier -> prover ------------------------------------------------------------------------------------------


def encode_hello(hello: Hello) -> bytes:
    """HELLO as canonical JSON: sorted keys, no spaces, ASCII."""
    fields = {
        "protocol": hello.protocol,
        "spec": hello.spec,
        "session": f"{hello.session:016x}",
        "model_path": hello.model_path,
        "model_digest": hello.model_digest,
        "mode": hello.mode.name.lower(),
        "limits": {name: getattr(hello.limits, name) for name in _LIMIT_NAMES},
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def decode_hello(payload: Buffer) -> Hello:
    """Prover side. Raises: BadRequest unless the payload is exactly what `encode_hello` makes of valid fields."""
    raw = bytes(payload)
    if len(raw) > MAX_HELLO_BYTES:
        raise BadRequest("HELLO is too long")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest("HELLO is not JSON") from error
    if not isinstance(fields, dict):
        raise BadRequest("HELLO is not an object")
    protocol = fields.get("protocol")
    if type(protocol) is not int or protocol != PROTOCOL_VERSION:
        raise BadRequest(f"HELLO is not of protocol {PROTOCOL_VERSION}")
    spec, session, mode, limits = (fields.get(name) for name in ("spec", "session", "mode", "limits"))
    path, digest = fields.get("model_path"), fields.get("model_digest")
    if type(spec) is not int or not 1 <= spec < 2**32:
        raise BadRequest("HELLO names no spec version")
    if not (_is_hex(session, 16) and _is_hex(digest, 64)):
        raise BadRequest("HELLO has a bad session or model digest")
    if not isinstance(path, str) or len(path) > MAX_MODEL_PATH_CHARS or "\0" in path:
        raise BadRequest("HELLO has a bad model path")
    if not isinstance(mode, str) or mode not in ("claims", "logits", "operations"):
        raise BadRequest("HELLO has an unknown mode")
    if not isinstance(limits, dict) or set(limits) != set(_LIMIT_NAMES):
        raise BadRequest("HELLO has other limits than those of this protocol")
    hello = Hello(spec, int(str(session), 16), path, str(digest), Mode[mode.upper()], Limits(**limits))
    # One encoding per meaning: rejects duplicate and unknown keys, floats, spaces.
    if encode_hello(hello) != raw:
        raise BadRequest("HELLO is not canonical")
    return hello


def _is_hex(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and set(value) <= set("0123456789abcdef")


def step_bytes(num_entries: int, total_tokens: int) -> int:
    """Size of a STEP's payload."""
    return _STEP.size + num_entries * _STEP_ENTRY.size + total_tokens * 4


def encode_step(step: Step) -> bytes:
    """STEP payload: fixed part, entries, token ids."""
    token_ids = np.ascontiguousarray(step.token_ids_i32, dtype="<i4")
    head = _STEP.pack(step.step, step.mode, step.attention_check, len(step.entries), token_ids.size)
    entries = b"".join(
        _STEP_ENTRY.pack(e.seq_id, e.start, e.num_tokens, e.logits, 0 if e.kv_limit is None else e.kv_limit + 1)
        for e in step.entries
    )
    return head + entries + token_ids.tobytes()


def decode_step(payload: Buffer, limits: Limits) -> Step:
    """Prover side: a STEP within the limits.

    Bounds: 1 <= entries <= max_sequences with distinct sequences; 1 <= tokens <= max_tokens_per_step;
    start + num_tokens <= max_positions; 0 <= token id < vocab_size.
    Raises: BadRequest.
    """
    raw = bytes(payload)
    if len(raw) < _STEP.size:
        raise BadRequest("STEP is too short")
    step, mode, check, num_entries, total = _STEP.unpack_from(raw)
    if not 1 <= num_entries <= limits.max_sequences or not 1 <= total <= limits.max_tokens_per_step:
        raise BadRequest("STEP has too many or no entries or tokens")
    if len(raw) != step_bytes(num_entries, total):
        raise BadRequest("STEP has another length than its counts say")
    if mode > Mode.LOGITS or check > AttentionCheck.TRANSFER:
        raise BadRequest("STEP has an unknown mode or attention check")
    entries = []
    for index in range(num_entries):
        fields = _STEP_ENTRY.unpack_from(raw, _STEP.size + index * _STEP_ENTRY.size)
        seq_id, start, num_tokens, logits, limit = fields
        if logits > LogitRows.ALL or num_tokens < 1 or start + num_tokens > limits.max_positions:
            raise BadRequest(f"STEP entry {index} is out of range")
        kv_limit = limit - 1 if limit else None
        if kv_limit is not None and start < kv_limit < start + num_tokens:
            raise BadRequest(f"STEP entry {index} lies on both sides of its limit")
        entries.append(StepEntry(seq_id, start, num_tokens, LogitRows(logits), kv_limit))
    if sum(e.num_tokens for e in entries) != total:
        raise BadRequest("STEP entries do not add up to its tokens")
    if len({e.seq_id for e in entries}) != num_entries:
        raise BadRequest("STEP names a sequence twice")
    token_ids = np.frombuffer(raw, dtype="<i4", offset=len(raw) - total * 4).astype(np.int32)
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= limits.vocab_size:
        raise BadRequest("STEP has a token id outside the vocabulary")
    return Step(step, Mode(mode), AttentionCheck(check), tuple(entries), token_ids)


def encode_free(seq_ids: Sequence[int]) -> bytes:
    """FREE payload: the sequences whose KV entries are dropped."""
    return b"".join(map(_U64.pack, seq_ids))


def decode_free(payload: Buffer, limits: Limits) -> tuple[int, ...]:
    """Prover side. Raises: BadRequest for none, too many or a torn list."""
    raw = bytes(payload)
    if not 8 <= len(raw) <= 8 * limits.max_sequences or len(raw) % 8:
        raise BadRequest("FREE has a bad length")
    return tuple(value for (value,) in _U64.iter_unpack(raw))


# -- prover -> verifier ------------------------------------------------------------------------------------------


def encode_ready(ready: Ready) -> bytes:
    """READY payload; a long device name is cut."""
    device = ready.device.encode("utf-8", "replace")[:48].decode("utf-8", "ignore").encode()
    return _READY.pack(ready.pid, ready.protocol, ready.spec, 0, device)


def decode_ready(payload: Buffer, spec: int) -> Ready:
    """Verifier side: READY of this protocol and spec version.

    Trust: the payload is adversarial; its strings are sanitised, its pid is never signalled.
    Raises: MalformedMessage (size, padding); ProverFault (another version).
    """
    raw = bytes(payload)
    if len(raw) != READY_BYTES:
        raise MalformedMessage("READY has the wrong size")
    pid, protocol, claimed_spec, pad, device = _READY.unpack(raw)
    if pad != 0:
        raise MalformedMessage("READY has non-zero padding")
    if protocol != PROTOCOL_VERSION or claimed_spec != spec:
        raise ProverFault(
            f"the prover speaks protocol {protocol} and spec {claimed_spec}, not {PROTOCOL_VERSION} and {spec}",
            hint="use a prover of the same version",
        )
    return Ready(pid, protocol, claimed_spec, printable(device, 48))


def encode_error(code: int, text: str) -> bytes:
    """ERROR payload; a long text is cut."""
    return _ERROR.pack(code, text.encode("utf-8", "replace")[:252].decode("utf-8", "ignore").encode())


def decode_error(payload: Buffer) -> tuple[int, str]:
    """Verifier side: the code and the sanitised text of an ERROR. Raises: MalformedMessage for a wrong size."""
    raw = bytes(payload)
    if len(raw) != ERROR_BYTES:
        raise MalformedMessage("ERROR has the wrong size")
    code, text = _ERROR.unpack(raw)
    return code, printable(text, 252)
