"""What a channel needs of the thing that carries its bytes, and how each side names the other's failures."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable
from enum import Enum
from typing import Protocol

from veriattn.errors import MalformedMessage, ProverTimeout, ProverUnavailable, VeriattnError
from veriattn.wire.messages import BadRequest, VerifierGone


class Role(Enum):
    """Which side of the link this process is: decides which error a broken link becomes."""

    VERIFIER = "verifier"
    PROVER = "prover"

    def gone(self) -> VeriattnError:
        """The other side died or closed its end."""
        if self is Role.VERIFIER:
            return ProverUnavailable("the prover closed its link or died", hint="see the prover's last output")
        return VerifierGone("the verifier closed its link or died")

    def timeout(self, what: str) -> VeriattnError:
        """The other side made no progress in time."""
        if self is Role.VERIFIER:
            return ProverTimeout(f"the prover did not {what} in time")
        return VerifierGone(f"the verifier did not {what} in time")

    def malformed(self, what: str) -> VeriattnError:
        """The other side broke the format."""
        return MalformedMessage(what) if self is Role.VERIFIER else BadRequest(what)


class Transport(Protocol):
    """A pair of ordered byte streams. One thread may write while another reads.

    `deadline` is a value of `time.monotonic()`, or None to wait for as long as the other side lives.
    `read_wait_s`, `write_wait_s`: seconds spent in waiting for the other side so far, for measuring.
    """

    @property
    def read_wait_s(self) -> float: ...

    @property
    def write_wait_s(self) -> float: ...

    def write_message(self, parts: Iterable[memoryview], deadline: float | None) -> None:
        """Write one whole message; `parts` are non-empty and contiguous bytes."""

    def read_into(self, out: memoryview, deadline: float | None) -> None:
        """Fill `out`, which is private memory, with the next bytes of the message; each is taken exactly once."""

    def end_message(self) -> None:
        """The message being read is complete."""

    def wipe(self) -> None:
        """Zero what is left of messages that the other side has taken, and of those taken from it; no thread is writing."""

    def abort(self) -> None:
        """From any thread: every wait, now and later, fails as if the other side were gone."""

    def close(self) -> None:
        """Release everything; may be called twice; no other thread uses the transport."""


def poll_ms(deadline: float | None, at_most_ms: float) -> float:
    """Milliseconds to sleep before the next look, 0 or less once the deadline has passed."""
    if deadline is None:
        return at_most_ms
    return min(at_most_ms, (deadline - time.monotonic()) * 1000)


class ControlLink:
    """The Unix socket beside a ring: wake-ups as single bytes, and the news of the other side's death.

    What the bytes are and how many come does not matter; a reader looks at the counters again after each.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.gone = False

    def poller(self) -> select.poll:
        """A poll object for one thread."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return poller

    def wake(self) -> None:
        """Nudge the other side; a full socket means that it has nudges enough."""
        try:
            self._sock.send(b"\0", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self.gone = True

    def sleep(self, poller: select.poll, timeout_ms: float) -> None:
        """Until a wake-up, the other side's end or the time-out."""
        if not poller.poll(timeout_ms):
            return
        try:
            if not self._sock.recv(4096, socket.MSG_DONTWAIT):
                self.gone = True
        except BlockingIOError:
            return
        except OSError:
            self.gone = True

    def abort(self) -> None:
        """As if the other side were gone; sleepers notice at once."""
        self.gone = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
