"""Channels: framed messages over a ring or a stream, with every header compared to what the protocol expects.

The verifier's side says which kind and how many payload bytes come next (`recv`, `expect` + `recv_into`); the prover's
side takes what comes within the agreed limits (`recv_any`). One thread may send while another receives. The first fault
closes a channel for good.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt

from veriattn.errors import (
    ConfigError,
    InternalError,
    MalformedMessage,
    ProverFault,
    ProverUnavailable,
    TranscriptMismatch,
    UsageError,
    VeriattnError,
)
from veriattn.trace import NO_TRACE, Trace
from veriattn.wire.emulate import EmulatedTransport, PumpedStream, Throttle
from veriattn.wire.messages import (
    ERROR_BYTES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_HELLO_BYTES,
    BadRequest,
    Buffer,
    Kind,
    Limits,
    byte_view,
    decode_error,
)
from veriattn.wire.ring import RingGeometry, RingTransport, create_segment, read_geometry
from veriattn.wire.stream import StreamTransport, parse_address
from veriattn.wire.transport import ControlLink, Role, Transport

PROVER_FD_VARIABLE = "VERIATTN_PROVER_FD"
DEFAULT_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
NAP_S = 120e-6

_GREETING = struct.Struct("<II8x")  # magic, transport; with a ring the segment's descriptor travels along
_GREETING_MAGIC = 0x31474156  # "VAG1"
_RING, _STREAM = 1, 2
_SMALLEST_BUFFER = 1024
_OPERATIONS = frozenset(Kind(k) for k in range(Kind.LINEAR, Kind.LOAD + 1))
_REQUESTS = _OPERATIONS | {Kind.HELLO, Kind.STEP, Kind.FREE, Kind.SHUTDOWN}


class Channel:
    """Frames over a transport, seen from one side.

    Verifier: `session` is drawn here, from the system's generator. Prover: it is learnt from the first message.
    """

    def __init__(self, transport: Transport, role: Role, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self._transport, self._role = transport, role
        self.timeout_s = timeout_s
        self.session: int | None = secrets.randbits(64) if role is Role.VERIFIER else None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._send_seq = 0
        self._recv_seq = 0
        self._remaining = 0  # payload bytes of the current message that are still to be read
        self._header = bytearray(HEADER_BYTES)
        self._header_view = memoryview(self._header)
        self._fault: VeriattnError | None = None
        self._closed = False
        ring = transport if isinstance(transport, RingTransport) else None
        self._put = None if ring is None else ring.put_messages
        self._take = None if ring is None else ring.take_messages
        self._write_pieces = None if ring is None else ring.write_pieces
        self.trace: Trace = NO_TRACE
        self._mark = 0.0  # prover: when it last sent or received

    def set_trace(self, trace: Trace) -> None:
        """Record sending, receiving and waiting from here on."""
        self.trace = trace
        if isinstance(self._transport, EmulatedTransport):
            self._transport.trace = trace

    # -- sending ---------------------------------------------------------------------------------------------

    def send(self, kind: Kind, *payload: Buffer, timeout_s: float | None = None) -> None:
        """Send one message; the payload buffers (C-contiguous) are written one after the other.

        Raises: ProverTimeout, ProverUnavailable, MalformedMessage (prover side: VerifierGone, BadRequest).
        """
        self._check_usable()
        if self.session is None:
            raise InternalError("the prover spoke before the first message of the verifier")
        views = [byte_view(buffer) for buffer in payload if memoryview(cast(Any, buffer)).nbytes]
        size = sum(map(len, views))
        header = HEADER.pack(MAGIC, kind, 0, self.session, self._send_seq, size)
        trace, start = self.trace, time.monotonic()
        if trace.enabled and self._mark:
            trace.add("compute", self._mark, start)
        waited_s = self._transport.write_wait_s
        try:
            self._transport.write_message([memoryview(header), *views], self._deadline(timeout_s))
        except VeriattnError as error:
            self._fault = error
            raise
        if trace.enabled:
            label = None if self._role is Role.PROVER else kind.name
            trace.waited("blocked", start, self._transport.write_wait_s - waited_s, "send", label)
            self._mark = time.monotonic() if self._role is Role.PROVER else 0.0
        self._send_seq += 1
        self.bytes_sent += HEADER_BYTES + size

    def send_all(self, kind: Kind, payloads: Sequence[npt.NDArray[np.generic]]) -> None:
        """`send` for each payload; through a ring in one go where there is room. Raises: as `send`."""
        done = 0
        put = self._put
        if put is not None:
            self._check_usable()
            sizes = [p.nbytes for p in payloads]
            start = time.monotonic()
            done = put(b"".join(self._headers(kind, self._send_seq, sizes)), payloads)
            self._sent(done, sum(sizes[:done]), start, 0.0)
        for payload in payloads[done:]:
            self.send(kind, payload)

    def send_pieces(
        self, kind: Kind, sizes: Sequence[int], start_piece: Callable[[int, int, memoryview], Callable[[], None]]
    ) -> None:
        """`send` for each payload of so many bytes, which something else than this thread writes to `outgoing_memory`.

        start_piece(message, at, to): begin to write the payload's bytes from `at` on to `to`; what it returns waits until
        they are there. Raises: as `send`; InternalError where the link has no such memory.
        """
        self._check_usable()
        if self._write_pieces is None:
            raise InternalError("this link has no memory that others could write to")
        headers = self._headers(kind, self._send_seq, sizes)
        start, waited_s = time.monotonic(), self._transport.write_wait_s
        try:
            self._write_pieces(headers, sizes, start_piece, self._deadline(None))
        except VeriattnError as error:
            self._fault = error
            raise
        self._sent(len(sizes), sum(sizes), start, self._transport.write_wait_s - waited_s)

    @property
    def outgoing_memory(self) -> memoryview | None:
        """Shared memory that what is sent is written to; None for a socket."""
        return self._transport.outgoing_memory if isinstance(self._transport, RingTransport) else None

    def _sent(self, count: int, size: int, start: float, waited_s: float) -> None:
        """Count messages that have left together."""
        if self.trace.enabled and count:
            if self._mark:
                self.trace.add("compute", self._mark, start)
            self.trace.waited("blocked", start, waited_s, "send")
            self._mark = time.monotonic() if self._role is Role.PROVER else 0.0
        self._send_seq += count
        self.bytes_sent += HEADER_BYTES * count + size

    def _headers(self, kind: Kind, seq: int, sizes: Sequence[int]) -> list[bytes]:
        """What stands before messages of these sizes, the first of them number `seq`."""
        if self.session is None:
            raise InternalError("the prover spoke before the first message of the verifier")
        return [HEADER.pack(MAGIC, kind, 0, self.session, seq + i, size) for i, size in enumerate(sizes)]

    # -- receiving, verifier ---------------------------------------------------------------------------------

    def recv(
        self,
        kind: Kind,
        payload_bytes: int,
        out: npt.NDArray[np.generic] | None = None,
        timeout_s: float | None = None,
    ) -> npt.NDArray[np.generic]:
        """The payload of the next message, which must be of this kind and size, in private memory.

        Shapes: `out`, if given, is C-contiguous with nbytes == payload_bytes and is returned; else fresh uint8
        (payload_bytes,). Trust: the bytes are adversarial; each was copied out of shared memory once.
        Raises: as `expect`.
        """
        if out is None:
            out = np.empty(payload_bytes, np.uint8)
        elif out.nbytes != payload_bytes:
            raise InternalError("the receiving array has another size than the message")
        self.expect(kind, payload_bytes, timeout_s)
        if payload_bytes:
            self.recv_into(out, timeout_s)
        return out

    def recv_all(
        self,
        kind: Kind,
        outs: Sequence[npt.NDArray[np.generic]],
        timeout_s: float | None = None,
        *,
        naps: int = 0,
        nap_s: float = NAP_S,
    ) -> None:
        """`recv` for each of `outs` (C-contiguous, private); what lies in a ring already is taken in one go.

        naps: how often to sleep for `nap_s` before asking to be woken. Where more messages follow soon, that spares the
        prover a system call for each, and the verifier then finds several at once.

        Raises: as `expect`.
        """
        done, take = 0, self._take
        while done < len(outs):
            if take is not None and not self.trace.enabled:
                self._check_usable()
                if self._role is not Role.VERIFIER or self._remaining:
                    raise InternalError("recv_all() out of order")
                rest = outs[done:]
                count = take(b"".join(self._headers(kind, self._recv_seq, [out.nbytes for out in rest])), rest)
                self._recv_seq += count
                self.bytes_received += sum(HEADER_BYTES + out.nbytes for out in rest[:count])
                done += count
            if naps and take is not None and done < len(outs):
                naps -= 1
                time.sleep(nap_s)
            elif done < len(outs):
                self.recv(kind, outs[done].nbytes, outs[done], timeout_s)
                done += 1

    def expect(self, kind: Kind, payload_bytes: int, timeout_s: float | None = None) -> None:
        """Take the next header and compare it with the expected one; the payload follows through `recv_into`.

        Raises: ProverTimeout; ProverUnavailable; MalformedMessage (magic, flags, session, ring counters);
        TranscriptMismatch (kind, sequence number, size); ProverFault (the prover reports an error instead).
        """
        self._check_usable()
        if self._role is not Role.VERIFIER or self._remaining or payload_bytes < 0:
            raise InternalError("expect() out of order")
        start, waited_s = time.monotonic(), self._transport.read_wait_s
        try:
            self._take_header(kind, payload_bytes, self._deadline(timeout_s))
        except VeriattnError as error:
            self._fault = error
            raise
        if self.trace.enabled:
            self.trace.waited("idle", start, self._transport.read_wait_s - waited_s, "copy-in")

    def _take_header(self, kind: Kind, payload_bytes: int, deadline: float | None) -> None:
        self._transport.read_into(self._header_view, deadline)
        magic, got_kind, flags, session, seq, got_bytes = HEADER.unpack(self._header)
        if magic != MAGIC or flags != 0 or session != self.session:
            raise MalformedMessage("a message of the prover has a wrong magic, flags or session")
        if got_kind == Kind.ERROR != kind and seq == self._recv_seq and got_bytes == ERROR_BYTES:
            raw = bytearray(ERROR_BYTES)
            self._transport.read_into(memoryview(raw), deadline)
            code, text = decode_error(raw)
            raise ProverFault(f"the prover reports error {code}: {text or 'no text'}")
        if got_kind != kind or seq != self._recv_seq or got_bytes != payload_bytes:
            raise TranscriptMismatch(
                f"message {self._recv_seq} of the prover is not the expected {kind.name} of {payload_bytes} bytes"
            )
        self._recv_seq += 1
        self.bytes_received += HEADER_BYTES + payload_bytes
        self._remaining = payload_bytes
        if payload_bytes == 0:
            self._transport.end_message()

    def recv_into(self, out: Buffer, timeout_s: float | None = None) -> None:
        """Fill `out` (private, C-contiguous) with the next bytes of the expected message's payload.

        Works while the prover still writes the rest, so that a large claim can be checked tile by tile.
        Raises: ProverTimeout, ProverUnavailable, MalformedMessage.
        """
        self._check_usable()
        view = byte_view(out)
        if not 0 < view.nbytes <= self._remaining:
            raise InternalError("recv_into() beyond the end of the message")
        start, waited_s = time.monotonic(), self._transport.read_wait_s
        try:
            self._transport.read_into(view, self._deadline(timeout_s))
        except VeriattnError as error:
            self._fault = error
            raise
        if self.trace.enabled:
            self.trace.waited("idle", start, self._transport.read_wait_s - waited_s, "copy-in")
        self._remaining -= view.nbytes
        if self._remaining == 0:
            self._transport.end_message()

    # -- receiving, prover -----------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Prover side: whether something has come that was not received yet, if only the verifier's end."""
        self._check_usable()
        if not isinstance(self._transport, RingTransport | StreamTransport):
            raise InternalError("only a prover looks whether something has come")
        return self._transport.pending

    def recv_any(
        self, limits: Limits | None, timeout_s: float | None = None, *, operation_bytes: int = 0
    ) -> tuple[Kind, memoryview]:
        """Prover side: the next message of the verifier, whatever its kind. `limits` is None before HELLO.

        The payload is read-only and lives as long as something refers to it.

        operation_bytes: largest payload of a request of a single operation; 0 where the session has none.

        Waits without end unless a time-out is given. Raises: VerifierGone; BadRequest.
        """
        self._check_usable()
        if self._role is not Role.PROVER:
            raise InternalError("the verifier never takes a message that it does not expect")
        start = time.monotonic()
        deadline = None if timeout_s is None else start + timeout_s
        self._transport.read_into(self._header_view, deadline)
        magic, kind, flags, session, seq, payload_bytes = HEADER.unpack(self._header)
        if magic != MAGIC or flags != 0 or seq != self._recv_seq or self.session not in (None, session):
            raise BadRequest("a message has a wrong magic, flags, session or sequence number")
        if kind not in _REQUESTS or (kind == Kind.HELLO) != (seq == 0):
            raise BadRequest(f"kind {kind} is not expected here")
        if limits is None:
            bound = MAX_HELLO_BYTES
        else:
            bound = operation_bytes if kind in _OPERATIONS else limits.max_payload_bytes(kind)
        if payload_bytes > bound:
            raise BadRequest(f"{payload_bytes} bytes of payload are more than the limits allow")
        # Never from the interpreter's pools of small objects, whose free places `prover.wipe` does not reach.
        payload = memoryview(bytearray(max(payload_bytes, _SMALLEST_BUFFER)))[:payload_bytes]
        if payload_bytes:
            self._transport.read_into(payload, deadline)
        self._transport.end_message()
        self.session = session
        self._recv_seq += 1
        self.bytes_received += HEADER_BYTES + payload_bytes
        if self.trace.enabled:
            self._mark = time.monotonic()
            self.trace.add("idle", start, self._mark, "")
        return Kind(kind), payload.toreadonly()

    def wipe(self) -> None:
        """Zero what messages that are done with have left in this side's part of the link. Not while another thread sends."""
        self._check_usable()
        self._transport.wipe()

    # -- life ------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._fault is not None or self._closed:
            if self._role is Role.PROVER:
                raise self._role.gone()
            cause = "closed" if self._fault is None else f"closed after {self._fault.code}"
            raise ProverUnavailable(f"the link to the prover is {cause}", hint="open a new session")

    def _deadline(self, timeout_s: float | None) -> float | None:
        if timeout_s is None:
            timeout_s = self.timeout_s
        return None if timeout_s is None else time.monotonic() + timeout_s

    def abort(self) -> None:
        """From any thread: waits of other threads on this channel end as if the other side were gone."""
        self._transport.abort()

    def close(self) -> None:
        """Release the shared segment and the socket. May be called twice; not while another thread uses it."""
        self._closed = True
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RingChannel(Channel):
    """Frames through shared rings; the control socket beside them tells of the other side's end."""

    @classmethod
    def offer(
        cls,
        sock: socket.socket,
        geometry: RingGeometry | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        throttle: Throttle | None = None,
    ) -> RingChannel:
        """Verifier: make the segment, hand it over on `sock` (connected, AF_UNIX; owned from here on).

        throttle: an emulated link in between.

        Raises: ConfigError (no memory for the segment); ProverUnavailable.
        """
        geometry = geometry or RingGeometry()
        fd = create_segment(geometry)
        try:
            transport = RingTransport(fd, geometry, ControlLink(sock), Role.VERIFIER)
            try:
                socket.send_fds(sock, [_GREETING.pack(_GREETING_MAGIC, _RING)], [fd])
            except OSError as error:
                transport.close()
                raise Role.VERIFIER.gone() from error
        finally:
            os.close(fd)
        return cls(EmulatedTransport(transport, throttle) if throttle else transport, Role.VERIFIER, timeout_s)


class StreamChannel(Channel):
    """Frames over a stream socket."""

    @classmethod
    def offer(
        cls, sock: socket.socket, timeout_s: float | None = DEFAULT_TIMEOUT_S, throttle: Throttle | None = None
    ) -> StreamChannel:
        """Verifier: speak frames on `sock` (connected stream socket; owned from here on)."""
        transport = StreamTransport(sock, Role.VERIFIER)
        greeting = memoryview(_GREETING.pack(_GREETING_MAGIC, _STREAM))
        transport.write_message([greeting], None if timeout_s is None else time.monotonic() + timeout_s)
        if throttle is None:
            return cls(transport, Role.VERIFIER, timeout_s)
        return cls(EmulatedTransport(PumpedStream(transport), throttle), Role.VERIFIER, timeout_s)

    @classmethod
    def connect(
        cls, address: str, timeout_s: float = DEFAULT_TIMEOUT_S, throttle: Throttle | None = None
    ) -> StreamChannel:
        """Verifier: connect to a prover that listens at tcp://HOST:PORT, vsock://CID:PORT or unix:///PATH.

        timeout_s: of the channel; connecting itself gets at most CONNECT_TIMEOUT_S of it.

        Raises: UsageError (address); ProverUnavailable (nobody answers).
        """
        family, target = parse_address(address)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise UsageError(f"this machine cannot reach {address}: {error.strerror}") from error
        sock.settimeout(min(timeout_s, CONNECT_TIMEOUT_S))
        try:
            sock.connect(target)  # type: ignore[arg-type]
        except OSError as error:
            sock.close()
            raise ProverUnavailable(f"no prover answers at {address}", hint="start one there first") from error
        return cls.offer(sock, timeout_s, throttle)


def accept_channel(sock: socket.socket, timeout_s: float = DEFAULT_TIMEOUT_S) -> Channel:
    """Prover: read the greeting on `sock` (owned from here on) and open the channel that it offers.

    Raises: VerifierGone; BadRequest.
    """
    sock.settimeout(timeout_s)
    try:
        if sock.family == socket.AF_UNIX:
            raw, fds, _, _ = socket.recv_fds(sock, _GREETING.size, 1)
        else:
            raw, fds = sock.recv(_GREETING.size), []
        while 0 < len(raw) < _GREETING.size:
            more = sock.recv(_GREETING.size - len(raw))
            raw = raw + more if more else b""
    except OSError as error:
        raise Role.PROVER.gone() from error
    try:
        if not raw:
            raise Role.PROVER.gone()
        magic, transport = _GREETING.unpack(raw)
        if magic != _GREETING_MAGIC or (transport, len(fds)) not in ((_RING, 1), (_STREAM, 0)):
            raise BadRequest("the greeting is not one of this protocol")
        if transport == _STREAM:
            return StreamChannel(StreamTransport(sock, Role.PROVER), Role.PROVER, None)
        geometry = read_geometry(fds[0])
        return RingChannel(RingTransport(fds[0], geometry, ControlLink(sock), Role.PROVER), Role.PROVER, None)
    finally:
        for fd in fds:
            os.close(fd)


def inherited_channel() -> Channel:
    """Prover: the channel on the descriptor that the verifier named in VERIATTN_PROVER_FD.

    Raises: ConfigError where there is none; VerifierGone; BadRequest.
    """
    value = os.environ.get(PROVER_FD_VARIABLE, "")
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(
            f"{PROVER_FD_VARIABLE} names no descriptor", hint="a prover is started by `veriattn`, not by hand"
        )
    try:
        sock = socket.socket(fileno=int(value))
    except OSError as error:
        raise ConfigError(f"{PROVER_FD_VARIABLE} is not an open socket") from error
    sock.set_inheritable(False)
    return accept_channel(sock)
