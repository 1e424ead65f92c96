"""A pair of single-producer single-consumer rings of fixed-size slots in one sealed memfd.

Trust, seen from the verifier: every byte of the segment may be changed by the prover at any time. So the verifier keeps
its own counters in private memory and only publishes them; it reads the prover's counter in one atomic load, checks
that value and uses that value; and it copies payload bytes into private memory once. The seals (SHRINK, GROW, SEAL)
keep the segment's size, so that no access can fault.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import struct
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

from veriattn.errors import ConfigError, InternalError
from veriattn.wire.messages import Buffer
from veriattn.wire.transport import ControlLink, Role, poll_ms

_native: ModuleType | None
try:
    import veriattn.native as _built

    _native = _built
except ImportError:  # an independent prover may use this package where the extension is not built
    _native = None

RING_MAGIC = 0x3152_4156  # "VAR1"
CONTROL_BYTES = 4096
_GEOMETRY = struct.Struct("<IIQQQ")  # magic, layout version, slot_bytes, to_prover_slots, from_prover_slots
_TO_PROVER, _FROM_PROVER = 256, 512  # offsets of the two blocks of counters
_HEAD, _TAIL, _READER_WAITS, _WRITER_WAITS = 0, 64, 128, 192  # a cache line each

_NOEXEC_SEAL = 0x0008  # MFD_NOEXEC_SEAL, Linux 6.3; not named by Python yet
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_RING_BYTES = 1 << 36
_ZEROS = memoryview(bytes(64 * 1024))
_PIECE_BYTES = 512 * 1024  # counters move at least this often inside a large message, for each thread that reads it
_DEVICE_PIECE_BYTES, _DEVICE_PIECES = 4 * 1024 * 1024, 4  # of what a device writes: size, and how many at a time
_SPINS = 100
_RECHECK_MS = 1.0  # a wake-up can be lost (no store-load fence); never for longer than this
_IDLE_AFTER_S = 0.25
_IDLE_RECHECK_MS = 20.0


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """Sizes of the two rings. slot_bytes: a multiple of 4096. A message takes whole slots and may exceed the ring."""

    slot_bytes: int = 64 * 1024
    to_prover_slots: int = 64
    from_prover_slots: int = 512

    def __post_init__(self) -> None:
        if not 4096 <= self.slot_bytes <= 1 << 24 or self.slot_bytes % 4096:
            raise ConfigError(f"slot size {self.slot_bytes} is not a multiple of 4096 up to 16 MiB")
        if min(self.to_prover_slots, self.from_prover_slots) < 2:
            raise ConfigError("a ring needs at least 2 slots")
        if self.segment_bytes > _MAX_RING_BYTES:
            raise ConfigError(f"rings of {self.segment_bytes} bytes are beyond any use")

    @property
    def segment_bytes(self) -> int:
        """Size of the memfd."""
        return CONTROL_BYTES + self.slot_bytes * (self.to_prover_slots + self.from_prover_slots)


def create_segment(geometry: RingGeometry) -> int:
    """A sealed memfd with all its pages allocated and the geometry written. The caller owns the descriptor.

    Raises: ConfigError where the system refuses (memory limit, no memfd).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            fd = os.memfd_create("veriattn-ring", flags | _NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.memfd_create("veriattn-ring", flags)
        try:
            os.ftruncate(fd, geometry.segment_bytes)
            os.posix_fallocate(fd, 0, geometry.segment_bytes)
            os.pwrite(fd, _pack_geometry(geometry), 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot make a shared segment of {geometry.segment_bytes} bytes: {error.strerror}",
            hint="choose smaller rings",
        ) from error
    return fd


def _pack_geometry(geometry: RingGeometry) -> bytes:
    return _GEOMETRY.pack(RING_MAGIC, 1, geometry.slot_bytes, geometry.to_prover_slots, geometry.from_prover_slots)


def read_geometry(fd: int) -> RingGeometry:
    """Prover side: the geometry of a received segment. Raises: BadRequest, ConfigError."""
    raw = os.pread(fd, _GEOMETRY.size, 0)
    if len(raw) != _GEOMETRY.size:
        raise Role.PROVER.malformed("the shared segment is too short")
    magic, version, slot_bytes, to_prover_slots, from_prover_slots = _GEOMETRY.unpack(raw)
    if magic != RING_MAGIC or version != 1:
        raise Role.PROVER.malformed("the shared segment has an unknown layout")
    geometry = RingGeometry(slot_bytes, to_prover_slots, from_prover_slots)
    if os.fstat(fd).st_size != geometry.segment_bytes:
        raise Role.PROVER.malformed("the shared segment has another size than its geometry")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise Role.PROVER.malformed("the shared segment is not sealed")
    return geometry


class _Words:
    """Atomic 64-bit words of the control page; `offset` in bytes, a multiple of 8."""

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._u64 = page.cast("Q")
        self._native = _native
        # One aligned 8-byte access each way; x86 orders loads as acquire and stores as release by itself.
        if _native is None and platform.machine() != "x86_64":
            raise ConfigError("shared rings need the native extension on this machine", hint="build the extension")

    def load(self, offset: int) -> int:
        if self._native is not None:
            return int(self._native.load_acquire_u64(self._page, offset))
        return self._u64[offset >> 3]

    def store(self, offset: int, value: int) -> None:
        if self._native is not None:
            self._native.store_release_u64(self._page, offset, value)
        else:
            self._u64[offset >> 3] = value

    @property
    def page(self) -> memoryview:
        return self._page

    def release(self) -> None:
        self._u64.release()
        self._page.release()


class _RingEnd(ABC):
    """What producer and consumer share: place in the segment, waiting, wake-ups."""

    def __init__(
        self, words: _Words, base: int, data: memoryview, slot_bytes: int, control: ControlLink, role: Role
    ) -> None:
        self._words, self._base = words, base
        self._data = data
        self._size = len(data)
        self._slot = slot_bytes
        self._num_slots = self._size // slot_bytes
        self._control, self._poller, self._role = control, control.poller(), role
        self._pos = 0  # bytes since the start, private
        self.waited_s = 0.0
        self._limit = 0  # bytes that may be read (or written) up to, from the last checked counter of the other side

    @abstractmethod
    def _refresh(self) -> bool:
        """Look at the other side's counter; whether there is room, or data."""

    def _wait(self, flag: int, what: str, deadline: float | None) -> None:
        """Return once `_refresh` found room or data. Spins, then sleeps on the control socket."""
        for _ in range(_SPINS):
            if self._refresh():
                return
        words, control, flag = self._words, self._control, self._base + flag
        words.store(flag, 1)
        start = time.monotonic()
        recheck_ms, idle_from = _RECHECK_MS, start + _IDLE_AFTER_S
        try:
            while True:
                gone = control.gone  # looked at first: what was published before the end still counts
                if self._refresh():
                    return
                if gone:
                    raise self._role.gone()
                timeout_ms = poll_ms(deadline, recheck_ms)
                if timeout_ms <= 0:
                    raise self._role.timeout(what)
                control.sleep(self._poller, timeout_ms)
                if recheck_ms == _RECHECK_MS and time.monotonic() > idle_from:
                    recheck_ms = _IDLE_RECHECK_MS
        finally:
            words.store(flag, 0)
            self.waited_s += time.monotonic() - start


def _there() -> None:
    """Nothing to wait for."""


class RingProducer(_RingEnd):
    """The writing end of one ring."""

    _tail = 0
    _wiped = 0  # bytes since the start; all before are zero or written again

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._limit = self._size

    def _refresh(self) -> bool:
        tail = self._words.load(self._base + _TAIL)
        if tail == self._tail:
            return self._pos < self._limit
        # Adversarial: only ever moves forward, and never past what was published.
        if not self._tail < tail <= self._pos // self._slot:
            raise self._role.malformed("the ring's tail counter is out of range")
        self._tail = tail
        self._limit = tail * self._slot + self._size
        return True

    def write_message(self, parts: Iterable[memoryview], deadline: float | None) -> None:
        """Write one message from a slot boundary on; slots are published while it is written."""
        slot, size, data = self._slot, self._size, self._data
        published = self._pos // slot
        for part in parts:
            done, total = 0, len(part)
            while done < total:
                pos = self._pos
                room = self._limit - pos
                if room <= 0:
                    self._wait(_WRITER_WAITS, "take data", deadline)
                    continue
                offset = pos % size
                count = min(total - done, room, size - offset, _PIECE_BYTES)
                data[offset : offset + count] = part[done : done + count]
                done += count
                self._pos = pos + count
                if (pos + count) // slot > published:
                    published = (pos + count) // slot
                    self._publish(published)
        head = -(-self._pos // slot)
        self._pos = head * slot
        if head > published:
            self._publish(head)

    def write_pieces(
        self,
        headers: Sequence[bytes],
        sizes: Sequence[int],
        start: Callable[[int, int, memoryview], Callable[[], None]],
        deadline: float | None,
    ) -> None:
        """Write messages whose payloads, of so many bytes, are put into the ring by something else: a device's copy engine.

        start(message, at, to): begin to write the payload's bytes from `at` on to `to`; what it returns waits until they are
        there. Several pieces are under way at a time; slots are published when their bytes are there.
        """
        size, data = self._size, self._data
        most = min(_DEVICE_PIECE_BYTES, size // 4)
        under_way: deque[tuple[Callable[[], None], int]] = deque()
        at = self._pos  # of the next piece; what lies between `_pos` and here is under way

        def settle() -> None:
            wait, end = under_way.popleft()
            wait()
            before, self._pos = self._pos // self._slot, end
            if end // self._slot > before:
                self._publish(end // self._slot)

        def room() -> int:
            while self._limit <= at:
                if under_way:
                    settle()
                    self._refresh()
                else:
                    self._wait(_WRITER_WAITS, "take data", deadline)
            return self._limit - at

        try:
            for message, (header, total) in enumerate(zip(headers, sizes, strict=True)):
                room()  # whole slots
                data[at % size : at % size + len(header)] = header
                at, done = at + len(header), 0
                while done < total:
                    count = min(total - done, room(), size - at % size, most)
                    end = at + count
                    under_way.append((start(message, done, data[at % size : at % size + count]), end))
                    at, done = end, done + count
                    if len(under_way) == _DEVICE_PIECES:
                        settle()
                at = -(-at // self._slot) * self._slot
                under_way.append((_there, at))
            while under_way:
                settle()
        finally:
            under_way.clear()  # an error that is kept must not keep views of the segment

    def wipe(self) -> None:
        """Zero every slot that was written since the last time and is free again; the other side has done with those.

        A free slot belongs to the producer alone, so nothing that is being read changes. Between messages only.
        """
        self._refresh()
        first = max(self._wiped, self._pos - self._size)
        last = min(self._pos, self._tail * self._slot)
        while first < last:
            offset = first % self._size
            count = min(last - first, self._size - offset, len(_ZEROS))
            self._data[offset : offset + count] = _ZEROS[:count]
            first += count
        self._wiped = max(self._wiped, last)

    def put(self, headers: bytes, payloads: Sequence[Buffer]) -> int:
        """Write whole messages while there is room, without waiting; returns how many. headers: one for each payload."""
        if _native is None:
            return 0
        self._pos, self._tail, count, waits = _native.ring_put(
            self._words.page, self._base, self._data, self._slot, self._pos, self._tail, headers, list(payloads)
        )
        self._limit = self._tail * self._slot + self._size
        if waits:
            self._control.wake()
        return int(count)

    def _publish(self, head: int) -> None:
        self._words.store(self._base + _HEAD, head)
        if self._words.load(self._base + _READER_WAITS):
            self._control.wake()


class RingConsumer(_RingEnd):
    """The reading end of one ring."""

    _head = 0
    _freed = 0

    def _refresh(self) -> bool:
        head = self._words.load(self._base + _HEAD)
        if head != self._head:
            # Adversarial: only ever moves forward, and at most one ring ahead of what was freed.
            if not self._head < head <= self._freed + self._num_slots:
                raise self._role.malformed("the ring's head counter is out of range")
            self._head = head
            self._limit = head * self._slot
        return self._pos < self._limit

    def read_into(self, out: memoryview, deadline: float | None) -> None:
        """Copy the next len(out) bytes of the message into private memory, freeing slots on the way."""
        size, data, done, total = self._size, self._data, 0, len(out)
        # Work for every thread, while most of the ring is left to the writer.
        threads = 1 if _native is None or total < 2 * _PIECE_BYTES else _native.get_threads()
        piece = max(_PIECE_BYTES, min(size // 4, threads * _PIECE_BYTES))
        while done < total:
            pos = self._pos
            ready = self._limit - pos
            if ready <= 0:
                self._wait(_READER_WAITS, "answer", deadline)
                continue
            offset = pos % size
            count = min(total - done, ready, size - offset, piece)
            if _native is not None and count >= _PIECE_BYTES:
                _native.copy_in(out, done, data, offset, count)
            else:
                out[done : done + count] = data[offset : offset + count]
            done += count
            self._pos = pos + count
            self._free(self._pos // self._slot)

    def take(self, headers: bytes, outs: Sequence[Buffer]) -> int:
        """Copy messages that are complete and have exactly these headers into private memory, without waiting.

        Returns how many; the next one, where it is not as expected, is left for `read_into`.
        """
        if _native is None:
            return 0
        self._pos, self._head, count, waits = _native.ring_take(
            self._words.page, self._base, self._data, self._slot, self._pos, self._head, headers, list(outs)
        )
        self._limit, self._freed = self._head * self._slot, max(self._freed, self._pos // self._slot)
        if waits:
            self._control.wake()
        return int(count)

    def written_position(self) -> int:
        """What the other side's counter says at this moment, in bytes; unchecked, for timing only."""
        return self._words.load(self._base + _HEAD) * self._slot

    def read_position(self) -> int:
        """Bytes taken since the start, with what was skipped."""
        return self._pos

    def pending(self) -> bool:
        """Whether there is more to read."""
        return self._refresh()

    def end_message(self) -> None:
        """Skip to the next slot boundary."""
        tail = -(-self._pos // self._slot)
        self._pos = tail * self._slot
        self._free(tail)

    def _free(self, tail: int) -> None:
        if tail > self._freed:
            self._freed = tail
            self._words.store(self._base + _TAIL, tail)
            if self._words.load(self._base + _WRITER_WAITS):
                self._control.wake()


class RingTransport:
    """Both rings of a segment, seen from one side. Owns the control socket; maps `fd` but does not own it."""

    def __init__(self, fd: int, geometry: RingGeometry, control: ControlLink, role: Role) -> None:
        self._control = control
        self._map = mmap.mmap(fd, geometry.segment_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        whole = memoryview(self._map)
        split = CONTROL_BYTES + geometry.slot_bytes * geometry.to_prover_slots
        to_prover, from_prover = whole[CONTROL_BYTES:split], whole[split : geometry.segment_bytes]
        self._words = _Words(whole[:CONTROL_BYTES])
        self._views = (to_prover, from_prover, whole)
        out, into = (_TO_PROVER, to_prover), (_FROM_PROVER, from_prover)
        if role is Role.PROVER:
            out, into = into, out
        self._producer = RingProducer(self._words, *out, geometry.slot_bytes, control, role)
        self._consumer = RingConsumer(self._words, *into, geometry.slot_bytes, control, role)
        self.write_message = self._producer.write_message
        self.read_into = self._consumer.read_into
        self.end_message = self._consumer.end_message
        self.wipe = self._producer.wipe
        self.put_messages = self._producer.put
        self.write_pieces = self._producer.write_pieces
        #: What the producer writes to.
        self.outgoing_memory = out[1]
        self.take_messages = self._consumer.take
        self.written_position = self._consumer.written_position
        self.read_position = self._consumer.read_position
        self.abort = control.abort
        self._closed = False

    @property
    def read_wait_s(self) -> float:
        """Seconds spent in waiting for data."""
        return self._consumer.waited_s

    @property
    def write_wait_s(self) -> float:
        """Seconds spent in waiting for room."""
        return self._producer.waited_s

    @property
    def pending(self) -> bool:
        """Whether there is something to read, or nobody to write it."""
        return self._consumer.pending() or self._control.gone

    def close(self) -> None:
        """Unmap the segment and close the control socket."""
        if self._closed:
            return
        self._closed = True
        self._control.close()
        self._words.release()
        for view in self._views:
            view.release()
        try:
            self._map.close()
        except BufferError as error:
            raise InternalError("a view of the shared segment is still in use") from error
