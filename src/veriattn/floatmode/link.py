"""The link to the floating-point prover: small typed frames over the shared rings of the exact system."""

from __future__ import annotations

import os
import socket
import struct
import time
from enum import IntEnum
from typing import Any

import numpy as np

from veriattn.errors import ConfigError, TranscriptMismatch
from veriattn.floatmode.formats import Array
from veriattn.wire.channel import PROVER_FD_VARIABLE
from veriattn.wire.messages import BadRequest
from veriattn.wire.ring import RingGeometry, RingTransport, create_segment, read_geometry
from veriattn.wire.transport import ControlLink, Role

_MAGIC = 0x3146_4156  # "VAF1"
_HEADER = struct.Struct("<IIQQ")  # magic, kind, sequence number, payload bytes
HEADER_BYTES = _HEADER.size
_GREETING = b"VAF1"
MAX_REQUEST_BYTES = 1 << 32


class Frame(IntEnum):
    """Kinds of frames. Requests go to the prover; each is followed by the claims that it asks for, and nothing else."""

    HELLO = 1
    READY = 2
    RESET = 3
    LINEAR = 4
    ATTEND = 5
    SCORES = 6
    VALUES = 7
    CLAIM = 8


class FloatLink:
    """One side of the link. The trusted side says how long a claim is; a length of the prover's is only compared.

    Trust: payloads are copied into private memory once. Raises: TranscriptMismatch, ProverUnavailable, ProverTimeout,
    MalformedMessage (prover's side: BadRequest, VerifierGone).
    """

    def __init__(self, transport: RingTransport, role: Role, timeout_s: float | None) -> None:
        self._transport, self._role, self._timeout_s = transport, role, timeout_s
        self._sent = self._received = 0
        self.bytes_sent = self.bytes_received = 0
        self.wait_s = 0.0

    @classmethod
    def offer(cls, sock: socket.socket, timeout_s: float = 300.0) -> FloatLink:
        """Trusted side: make the segment and hand it over. Raises: ConfigError, ProverUnavailable."""
        geometry = RingGeometry(from_prover_slots=256)
        fd = create_segment(geometry)
        try:
            transport = RingTransport(fd, geometry, ControlLink(sock), Role.VERIFIER)
            try:
                socket.send_fds(sock, [_GREETING], [fd])
            except OSError as error:
                transport.close()
                raise Role.VERIFIER.gone() from error
        finally:
            os.close(fd)
        return cls(transport, Role.VERIFIER, timeout_s)

    @classmethod
    def inherited(cls) -> FloatLink:
        """Prover: the link on the descriptor in VERIATTN_PROVER_FD. Raises: ConfigError, BadRequest, VerifierGone."""
        value = os.environ.get(PROVER_FD_VARIABLE, "")
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{PROVER_FD_VARIABLE} names no descriptor", hint="veriattn starts this program")
        sock = socket.socket(fileno=int(value))
        sock.set_inheritable(False)
        sock.settimeout(60.0)
        try:
            raw, fds, _, _ = socket.recv_fds(sock, len(_GREETING), 1)
        except OSError as error:
            raise Role.PROVER.gone() from error
        try:
            if raw != _GREETING or len(fds) != 1:
                raise BadRequest("the greeting is not one of the floating-point protocol")
            return cls(RingTransport(fds[0], read_geometry(fds[0]), ControlLink(sock), Role.PROVER), Role.PROVER, None)
        finally:
            for fd in fds:
                os.close(fd)

    def send(self, kind: Frame, *payload: bytes | bytearray | Array) -> None:
        """One frame; the parts are written one after the other."""
        arrays = (
            np.frombuffer(p, np.uint8) if isinstance(p, bytes | bytearray) else np.ascontiguousarray(p) for p in payload
        )
        views = [array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes]
        size = sum(v.nbytes for v in views)
        header = memoryview(_HEADER.pack(_MAGIC, kind, self._sent, size))
        self._transport.write_message([header, *views], self._deadline())
        self._sent += 1
        self.bytes_sent += _HEADER.size + size

    def claim(self, shape: tuple[int, ...], dtype: np.dtype[Any], kind: Frame = Frame.CLAIM) -> Array:
        """Trusted side: the next frame, which must be of this kind and exactly this long."""
        out = np.empty(shape, dtype)
        got, size = self._header()
        if got != kind or size != out.nbytes:
            raise TranscriptMismatch(
                f"frame {self._received - 1} of the prover is no {kind.name} of {out.nbytes} bytes"
            )
        if out.nbytes:
            self._transport.read_into(out.data.cast("B"), self._deadline())
        self._transport.end_message()
        self.bytes_received += _HEADER.size + out.nbytes
        return out

    def request(self) -> tuple[Frame, bytes]:
        """Prover: the next request."""
        kind, size = self._header()
        if kind not in Frame.__members__.values() or size > MAX_REQUEST_BYTES:
            raise BadRequest(f"frame of kind {kind} with {size} bytes")
        payload = bytearray(size)
        if size:
            self._transport.read_into(memoryview(payload), None)
        self._transport.end_message()
        return Frame(kind), bytes(payload)

    def _header(self) -> tuple[int, int]:
        raw = bytearray(_HEADER.size)
        before = self._transport.read_wait_s
        self._transport.read_into(memoryview(raw), self._deadline())
        self.wait_s += self._transport.read_wait_s - before
        magic, kind, seq, size = _HEADER.unpack(raw)
        if magic != _MAGIC or seq != self._received:
            raise self._role.malformed("a frame has a wrong magic or sequence number")
        self._received += 1
        return kind, size

    def _deadline(self) -> float | None:
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s

    def abort(self) -> None:
        """From any thread: every wait fails."""
        self._transport.abort()

    def close(self) -> None:
        """Release the segment and the socket."""
        self._transport.close()
