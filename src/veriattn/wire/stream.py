"""The same frames over a stream socket: Unix, TCP or vsock, for provers on another host or outside the guest."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable

from veriattn.errors import UsageError
from veriattn.wire.transport import Role, poll_ms

_BUFFER_BYTES = 256 * 1024
_DIRECT_BYTES = 64 * 1024  # larger pieces go straight into their place
_IDLE_MS = 1000.0
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}


class StreamTransport:
    """Frames back to back on a connected socket, which the transport owns."""

    def __init__(self, sock: socket.socket, role: Role) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A host that vanished without a word is noticed within about two minutes, by whichever side waits.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sock, self._role = sock, role
        self._reader, self._writer = select.poll(), select.poll()
        self._reader.register(sock, select.POLLIN)
        self._writer.register(sock, select.POLLOUT)
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.read_wait_s = self.write_wait_s = 0.0
        self._start = self._stop = 0  # unread bytes of the buffer

    @property
    def pending(self) -> bool:
        """Whether bytes have come, or the other side's end."""
        return self._stop > self._start or bool(self._reader.poll(0))

    def write_message(self, parts: Iterable[memoryview], deadline: float | None) -> None:
        """Write the parts back to back."""
        pending = list(parts)
        while pending:
            try:
                sent = self._sock.sendmsg(pending, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._sleep(self._writer, "take data", deadline)
                continue
            except OSError as error:
                raise self._role.gone() from error
            while pending and sent >= len(pending[0]):
                sent -= len(pending.pop(0))
            if sent:
                pending[0] = pending[0][sent:]

    def read_into(self, out: memoryview, deadline: float | None) -> None:
        """Fill `out` with the next bytes of the stream."""
        done, total = 0, len(out)
        while done < total:
            buffered = min(self._stop - self._start, total - done)
            if buffered:
                out[done : done + buffered] = self._buffer[self._start : self._start + buffered]
                self._start += buffered
                done += buffered
            elif total - done >= _DIRECT_BYTES:
                done += self.receive_some(out[done:], deadline)
            else:
                self._start, self._stop = 0, self.receive_some(self._buffer, deadline)

    def receive_some(self, into: memoryview, deadline: float | None) -> int:
        """At least one byte, as many as there are."""
        while True:
            try:
                count = self._sock.recv_into(into)
            except BlockingIOError:
                self._sleep(self._reader, "answer", deadline)
                continue
            except OSError as error:
                raise self._role.gone() from error
            if count == 0:
                raise self._role.gone()
            if deadline is not None and count < len(into) and time.monotonic() > deadline:
                raise self._role.timeout("answer")  # a link that drips without ever being empty
            return count

    def _sleep(self, poller: select.poll, what: str, deadline: float | None) -> None:
        timeout_ms = poll_ms(deadline, _IDLE_MS)
        if timeout_ms <= 0:
            raise self._role.timeout(what)
        start = time.monotonic()
        poller.poll(timeout_ms)
        if poller is self._reader:
            self.read_wait_s += time.monotonic() - start
        else:
            self.write_wait_s += time.monotonic() - start

    def end_message(self) -> None:
        """Nothing to skip: frames follow each other without padding."""

    def wipe(self) -> None:
        """Zero the buffer up to what has not been read yet, and beyond it."""
        for used in (slice(0, self._start), slice(self._stop, _BUFFER_BYTES)):
            self._buffer[used] = bytes(used.stop - used.start)

    def abort(self) -> None:
        """End both directions; every wait fails."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def parse_address(address: str) -> tuple[socket.AddressFamily, object]:
    """Family and address of `tcp://HOST:PORT`, `vsock://CID:PORT` or `unix:///PATH`. Raises: UsageError."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme == "unix" and rest.startswith("/"):
        return socket.AF_UNIX, rest
    if scheme == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 65536:
        host = host.removeprefix("[").removesuffix("]")
        return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))
    if scheme == "vsock" and host.isascii() and host.isdigit() and port.isascii() and port.isdigit():
        family = getattr(socket, "AF_VSOCK", None)
        if family is None:
            raise UsageError("this Python has no vsock")
        return family, (int(host), int(port))
    raise UsageError(
        f"{address!r} is not an address of a prover", hint="tcp://HOST:PORT, vsock://CID:PORT or unix:///PATH"
    )


def listen(address: str) -> socket.socket:
    """Prover: a socket that listens at an address of `parse_address`. Raises: UsageError."""
    family, target = parse_address(address)
    try:
        server = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"this machine cannot listen at {address}: {error.strerror}") from error
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(target)  # type: ignore[arg-type]
        server.listen(1)
    except OSError as error:
        server.close()
        raise UsageError(f"cannot listen at {address}: {error.strerror}", hint="choose another address") from error
    return server
