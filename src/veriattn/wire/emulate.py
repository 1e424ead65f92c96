"""A slower link than there is: `--emulate-link` for either transport, on the verifier's side. For measuring only.

Each direction is a pipe of fixed rate and delay with its own virtual clock: bytes start to cross when they were sent,
or when the pipe is free, whichever is later, and may be used after transfer time and delay. Sending does not block (as
with DMA); what arrived while the verifier was busy is not waited for again. Nothing about checks or sizes changes.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

from veriattn.errors import UsageError, VeriattnError
from veriattn.trace import NO_TRACE, Trace
from veriattn.wire.stream import StreamTransport
from veriattn.wire.transport import Role, Transport

_PIECE_BYTES = 256 * 1024
_QUEUE_BYTES = 64 * 1024 * 1024
_SAMPLE_S = 0.0002
_FLUSH_S = 5.0


@dataclass(frozen=True, slots=True)
class Throttle:
    """gb_per_s: 10^9 bytes per second, each way. latency_us: one-way delay."""

    gb_per_s: float
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        if not 1e-5 <= self.gb_per_s <= 1e4 or not 0 <= self.latency_us <= 1e6:
            raise UsageError("an emulated link has 0.00001 to 10000 GB/s and a delay of 0 to 1000000 microseconds")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`GBPS[,LATENCY_US]`. Raises: UsageError."""
        try:
            return cls(*map(float, text.split(",", 1)))
        except ValueError as error:
            raise UsageError(
                f"{text!r} is not GBPS[,LATENCY_US]",
                hint="gigabytes per second and microseconds, for example --emulate-link 15,5",
            ) from error

    def __str__(self) -> str:
        delay = f", {self.latency_us:g} us" if self.latency_us else ""
        return f"{self.gb_per_s:g} GB/s{delay} (emulated)"

    @property
    def bytes_per_s(self) -> float:
        """Rate of one direction."""
        return self.gb_per_s * 1e9


class _Pipe:
    """Virtual clock of one direction."""

    def __init__(self, throttle: Throttle) -> None:
        self._rate = throttle.bytes_per_s
        self._delay_s = throttle.latency_us * 1e-6
        self._free_at = 0.0

    def arrival(self, num_bytes: int, sent_at: float) -> float:
        """When bytes that were handed to the link at `sent_at` have all arrived."""
        self._free_at = max(self._free_at, sent_at) + self.seconds(num_bytes)
        return self._free_at + self._delay_s

    def seconds(self, num_bytes: int) -> float:
        """What bytes take, without the delay."""
        return num_bytes / self._rate

    def crossed(self, num_bytes: int) -> tuple[float, float]:
        """When the bytes of the last `arrival` were in the pipe, for traces."""
        return self._free_at - self.seconds(num_bytes), self._free_at


def _sleep_until(when: float) -> None:
    remaining_s = when - time.monotonic()
    if remaining_s > 0:
        time.sleep(remaining_s)


class Observed(Transport, Protocol):
    """A transport that can tell how far the other side has written, for timing only."""

    def written_position(self) -> int:
        """Position up to which the other side claims to have written; not validated."""

    def read_position(self) -> int:
        """Position of the next byte to be read, on the same scale."""


class EmulatedTransport:
    """A transport behind an emulated link; owns `inner`.

    Two threads of its own: one delivers what is sent when it is due, one notes when the other side wrote what.
    """

    def __init__(self, inner: Observed, throttle: Throttle, role: Role = Role.VERIFIER) -> None:
        self._inner, self._role = inner, role
        self.trace: Trace = NO_TRACE
        self.write_wait_s = self._slept_s = 0.0
        self._out, self._in = _Pipe(throttle), _Pipe(throttle)
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._fault: VeriattnError | None = None
        self._times: list[float] = []
        self._positions: list[int] = []
        self._threads = [
            threading.Thread(target=target, name="veriattn-emulated-link", daemon=True)
            for target in (self._deliver, self._observe)
        ]
        for thread in self._threads:
            thread.start()

    # -- sending -----------------------------------------------------------------------------------------------

    def write_message(self, parts: Iterable[memoryview], deadline: float | None) -> None:
        """Queue a copy of the message; blocks only while 64 MiB are under way."""
        message = memoryview(b"".join(parts))
        with self._changed:
            while self._queued_bytes > _QUEUE_BYTES and self._fault is None:
                timeout_s = None if deadline is None else deadline - time.monotonic()
                if not self._changed.wait(timeout_s):
                    raise self._role.timeout("take data")
            if self._fault is not None:
                raise self._fault
            self._queue.append((self._out.arrival(len(message), time.monotonic()), message))
            self.trace.add("to prover", *self._out.crossed(len(message)), track="link")
            self._queued_bytes += len(message)
            self._changed.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closing:
                        return
                    self._changed.wait()
                due, message = self._queue[0]
            try:
                self._inner.write_message(self._crossing(message, due), None)  # ends with the peer or with abort()
            except VeriattnError as error:
                with self._changed:
                    self._fault = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._queue.popleft()
                self._queued_bytes -= len(message)
                self._changed.notify_all()

    def _crossing(self, message: memoryview, due: float) -> Iterator[memoryview]:
        """A message piece by piece, each when it has crossed: what comes after the last one is one piece's copy, as with DMA,
        and not the whole message's."""
        left = len(message)
        for first in range(0, len(message), _PIECE_BYTES):
            piece = message[first : first + _PIECE_BYTES]
            left -= len(piece)
            if not self._closing:
                _sleep_until(due - self._out.seconds(left))
            yield piece

    # -- receiving ---------------------------------------------------------------------------------------------

    def read_into(self, out: memoryview, deadline: float | None) -> None:
        """As the inner transport's, then waits until the bytes would have come over the link."""
        due = 0.0
        # The first bytes alone, so that the link starts with them and not with the next look of the other thread.
        for piece in (out[:_PIECE_BYTES], out[_PIECE_BYTES:]):
            if piece:
                self._inner.read_into(piece, deadline)
                end = self._inner.read_position()
                due = self._arrival(end - len(piece), end)
        if deadline is not None and due > deadline:
            _sleep_until(deadline)
            raise self._role.timeout("answer")
        start = time.monotonic()
        _sleep_until(due)
        self._slept_s += time.monotonic() - start

    @property
    def read_wait_s(self) -> float:
        """Seconds spent in waiting for the prover or for the link."""
        return self._inner.read_wait_s + self._slept_s

    def _arrival(self, first: int, end: int) -> float:
        """When bytes [first, end) have come over the link; they enter it when they were first seen to be written.

        In runs of bytes that were seen at the same time, as exact as byte by byte. What was not seen yet is sent now.
        """
        positions, times = self._positions, self._times
        index, due = bisect_right(positions, first), 0.0
        while first < end:
            if index < len(positions):
                stop, sent_at = min(end, positions[index]), times[index]
            else:
                stop, sent_at = end, time.monotonic()
            due = self._in.arrival(stop - first, sent_at)
            self.trace.add("from prover", *self._in.crossed(stop - first), track="link")
            first, index = stop, index + 1
        if index > 10_000:
            with self._changed:
                del positions[: index - 1], times[: index - 1]
        return due

    def _observe(self) -> None:
        latest = -1
        while not self._closing:
            position = self._inner.written_position()
            if position > latest:
                latest = position
                with self._changed:
                    self._times.append(time.monotonic())
                    self._positions.append(position)
            time.sleep(_SAMPLE_S)

    def end_message(self) -> None:
        """The message being read is complete."""
        self._inner.end_message()

    def wipe(self) -> None:
        """As the inner transport's, unless something is under way: then the next call does it."""
        with self._changed:
            if not self._queue:  # so the other thread is not writing
                self._inner.wipe()

    def abort(self) -> None:
        """End every wait."""
        self._inner.abort()

    def close(self) -> None:
        """Deliver what is queued without further delay, then close the inner transport."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._threads[0].join(_FLUSH_S)
        self._inner.abort()
        for thread in self._threads:
            thread.join()
        self._inner.close()


class PumpedStream:
    """A stream that is emptied as fast as it fills, so that the emulated link and not a socket buffer sets the pace.

    Bounded: takes no more than 64 MiB ahead. Owns `inner`.
    """

    def __init__(self, inner: StreamTransport, role: Role = Role.VERIFIER) -> None:
        self._inner, self._role = inner, role
        self.write_message = inner.write_message
        self.end_message = inner.end_message
        self.wipe = inner.wipe
        self._chunks: deque[memoryview] = deque()
        self._taken = self._written = 0
        self._changed = threading.Condition()
        self.read_wait_s = self.write_wait_s = 0.0
        self._fault: VeriattnError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._pump, name="veriattn-emulated-stream", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while True:
            with self._changed:
                while self._written - self._taken > _QUEUE_BYTES and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
            fault, count = None, 0
            try:
                count = self._inner.receive_some(buffer, None)
            except VeriattnError as error:
                fault = error
            with self._changed:
                self._fault = fault
                self._chunks.append(memoryview(bytes(buffer[:count])))
                self._written += count
                self._changed.notify_all()
            if fault is not None:
                return

    def read_into(self, out: memoryview, deadline: float | None) -> None:
        """Fill `out` with the next bytes of the stream."""
        done = 0
        while done < len(out):
            with self._changed:
                while self._written == self._taken:
                    if self._fault is not None:
                        raise self._fault
                    start = time.monotonic()
                    timeout_s = None if deadline is None else deadline - start
                    if not self._changed.wait(timeout_s):
                        raise self._role.timeout("answer")
                    self.read_wait_s += time.monotonic() - start
                chunk = self._chunks[0]
                count = min(len(chunk), len(out) - done)
                out[done : done + count] = chunk[:count]
                if count == len(chunk):
                    self._chunks.popleft()
                else:
                    self._chunks[0] = chunk[count:]
                done += count
                self._taken += count
                self._changed.notify_all()

    def written_position(self) -> int:
        """Bytes received from the socket so far."""
        return self._written

    def read_position(self) -> int:
        """Bytes handed on so far."""
        return self._taken

    def abort(self) -> None:
        """End every wait."""
        self._inner.abort()

    def close(self) -> None:
        """Stop the pump and close the socket."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._inner.abort()
        self._thread.join()
        self._inner.close()
