"""Memory that is made once and reused: room for activations, and slots through which claims leave the device."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

import torch
from veriattn.errors import InternalError, NumericsError
from veriattn.prover.backend import ClaimSink, GroupSink

_ALIGN = 256

#: Claims of a layer up to so many bytes cross in one piece, to pinned memory, and are copied into the ring from there. Larger
#: ones go straight into the ring: one copy less for the CPU, one call more for each claim.
STAGED_BYTES = 1 << 20


def aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def view(raw: torch.Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A typed view of bytes; `at` is a multiple of 256."""
    return raw[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Workspace:
    """Named buffers that grow and stay: no step allocates once the largest has run, and everything can be wiped."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._raw: dict[str, torch.Tensor] = {}
        #: Counts how often a buffer has moved; whoever remembers addresses looks here.
        self.moves = 0
        #: Buffers on the host's side, to be wiped with the others.
        self.uploads: list[Upload] = []

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The buffer of that name, uninitialised."""
        size = max(1, prod(shape) * dtype.itemsize)
        raw = self._raw.get(name)
        if raw is None or raw.numel() < size:
            if raw is not None:
                raw.zero_()
            self._raw[name] = raw = torch.zeros(aligned(size), dtype=torch.uint8, device=self._device)
            self.moves += 1
        return view(raw, 0, shape, dtype)

    def wipe(self) -> None:
        """Zero everything."""
        for raw in self._raw.values():
            raw.zero_()
        for upload in self.uploads:
            upload.host.zero_()

    def nonzero_bytes(self) -> int:
        both = [*self._raw.values(), *(u.host for u in self.uploads)]
        return sum(int(torch.count_nonzero(raw)) for raw in both)


class Upload:
    """Small host arrays in one piece to the device, at the same addresses as long as their sizes are the same."""

    def __init__(self, workspace: Workspace, name: str, pin: bool) -> None:
        self._workspace, self._name, self._pin = workspace, name, pin
        self.host = torch.zeros(0, dtype=torch.uint8)
        self._read: torch.cuda.Event | None = torch.cuda.Event() if pin else None
        workspace.uploads.append(self)

    def __call__(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
        """Views on the device, in order, for work that is queued from here on: the previous ones are overwritten."""
        offsets, size = [], 0
        for a in arrays:
            offsets.append(size)
            size += aligned(a.nbytes)
        if self._read is not None:
            self._read.synchronize()  # the device may not have taken the previous arrays yet
        if self.host.numel() < size:
            self.host = torch.zeros(2 * size, dtype=torch.uint8, pin_memory=self._pin)
        host = self.host.numpy()
        for a, at in zip(arrays, offsets, strict=True):
            host[at : at + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        raw = self._workspace.get(self._name, (size,), torch.uint8)
        raw.copy_(self.host[:size], non_blocking=True)
        if self._read is not None:
            self._read.record()
        return [
            view(raw, at, a.shape, torch.from_numpy(a[:0].reshape(-1)).dtype)
            for a, at in zip(arrays, offsets, strict=True)
        ]


@dataclass(frozen=True)
class Part:
    """A claim inside a slot: where it lies and what it is. `name` None: returned to the caller, not claimed."""

    name: str | None
    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class CopyEngine:
    """Copies from the device to the host, beside the kernels: on streams of their own, or at once where there is none.

    Copies of a queue wait for each other's marks. What is asked for as soon as a slot is filled has a queue of its own: pieces
    that are asked for later, when newer slots are marked already, would otherwise wait for the kernels of those.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def mark(self) -> torch.cuda.Event | None:
        """A point in the queue of kernels: after those that are queued by now."""
        if not self._streams:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def copy(
        self, to: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None, *, piece: bool = False
    ) -> Callable[[], None]:
        """Queue a copy of bytes behind the mark, with the pieces or with what is copied at once; what it returns waits until
        they are there."""
        if not self._streams or after is None:
            to.copy_(source)
            return _done
        stream = self._streams[piece]
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            to.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def settle(self) -> None:
        """Wait until nothing is under way any more."""
        if self._streams:
            torch.cuda.synchronize()

    def pin(self, memory: memoryview) -> bool:
        """Lock shared memory for the device's copy engine, for the life of this process; False where that is refused (inside
        a TDX guest, or by a limit on locked memory)."""
        if not self._streams:
            return True
        cudart = torch.cuda.cudart()
        address = np.frombuffer(memory, np.uint8).ctypes.data
        if cudart.cudaHostRegister(address, len(memory), 0) == cudart.cudaError.success:
            return True
        # A refused call leaves its error for the next launch to report: take it here.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)
        return False


def _done() -> None:
    """Nothing to wait for."""


class Slot:
    """Device memory that kernels write claims into, and pinned memory for what does not go straight to the ring. The first
    word is the flag."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.raw = torch.zeros(0, dtype=torch.uint8, device=device)
        self.host = torch.zeros(0, dtype=torch.uint8)

    def fit(self, size: int) -> bool:
        """Make it that large; True if it moved."""
        if self.raw.numel() >= size:
            return False
        self.raw.zero_()
        self.raw = torch.zeros(aligned(size), dtype=torch.uint8, device=self._device)
        return True

    def fit_host(self, size: int) -> None:
        """Make the host's side that large."""
        if self.host.numel() < size:
            self.host.zero_()
            self.host = torch.zeros(aligned(size), dtype=torch.uint8, pin_memory=self._device.type == "cuda")


@dataclass(frozen=True)
class _Sending:
    """A filled slot on its way: straight to the sink's memory, or by the host's side of the slot.

    filled: after the kernels that fill it. wait: until the host's side has what is copied there, the flag at least.
    """

    slot: Slot
    parts: list[Part]
    name: str
    sink: ClaimSink | None
    straight: GroupSink | None
    filled: torch.cuda.Event | None
    wait: Callable[[], None]


class Outbox:
    """A few slots in turn: kernels fill one while others are copied or sent.

    The device runs ahead of what has been sent by as many slots as there are. Large claims are written into the shared ring
    by the device's copy engine, where the ring can be pinned; small ones, and all where it cannot, by way of pinned memory.
    """

    def __init__(self, device: torch.device, slots: int = 3, engine: CopyEngine | None = None) -> None:
        self._engine = engine or CopyEngine(device)
        self._slots = [Slot(device) for _ in range(slots)]
        self._busy: deque[_Sending] = deque()
        self._next = 0
        self._reachable: bool | None = None  # whether the device can write to the ring; None: not tried
        self.results: list[np.ndarray[Any, Any]] = []
        #: Counts how often a slot has moved.
        self.moves = 0

    def take(self, size: int) -> Slot:
        """The next slot in turn; sends what it still holds. Raises: as `flush`."""
        slot = self._slots[self._next]
        while any(sending.slot is slot for sending in self._busy):
            self._send_oldest()
        self._next = (self._next + 1) % len(self._slots)
        if slot.fit(size):
            self.moves += 1
        return slot

    def rewind(self) -> None:
        """Begin with the first slot: a step that is repeated then meets the same addresses. Raises: InternalError
        while some are in use."""
        if self._busy:
            raise InternalError("claims are still on their way")
        self._next = 0

    def submit(self, slot: Slot, size: int, parts: list[Part], sink: ClaimSink | None, name: str = "") -> None:
        """Send the parts, in order, once the kernels queued so far are through; they lie in the first `size` bytes."""
        straight = self._straight(size, parts, sink)
        count = size if straight is None else _ALIGN
        slot.fit_host(count)
        filled = self._engine.mark()
        wait = self._engine.copy(slot.host[:count], slot.raw[:count], filled)
        self._busy.append(_Sending(slot, parts, name, sink, straight, filled, wait))

    def _straight(self, size: int, parts: list[Part], sink: ClaimSink | None) -> GroupSink | None:
        """The sink if the device is to write these claims into its memory."""
        if size <= STAGED_BYTES or not isinstance(sink, GroupSink) or any(part.name is None for part in parts):
            return None
        memory = sink.memory
        if memory is None:
            return None
        if self._reachable is None:
            self._reachable = self._engine.pin(memory)
        return sink if self._reachable else None

    def flush(self) -> list[np.ndarray[Any, Any]]:
        """Send everything; returns the parts that were not claims. Raises: NumericsError; what the sink raises."""
        while self._busy:
            self._send_oldest()
        results, self.results = self.results, []
        return results

    def drop(self) -> None:
        """After an error: wait for the copies and forget what was not sent."""
        self._engine.settle()
        self._busy.clear()
        self.results = []

    def _send_oldest(self) -> None:
        sending = self._busy.popleft()
        slot, parts, sink = sending.slot, sending.parts, sending.sink
        sending.wait()
        if int(view(slot.host, 0, (1,), torch.int32)[0]):
            raise NumericsError(
                "an activation is not finite or is 2**40 or larger",
                hint="the model does not fit the canonical numerics; convert it again and look at its quality report",
            )
        if sending.straight is not None:
            sizes = [prod(p.shape) * p.dtype.itemsize for p in parts]
            sending.straight.claim_pieces(sending.name, sizes, functools.partial(self._start_piece, sending))
            return
        values = [view(slot.host, part.at, part.shape, part.dtype).numpy() for part in parts]
        if isinstance(sink, GroupSink) and all(part.name is not None for part in parts):
            sink.claim_group(sending.name, values)
            return
        for part, array in zip(parts, values, strict=True):
            if part.name is None:
                self.results.append(array.copy())
            elif sink is not None:
                sink.claim(part.name, array)

    def _start_piece(self, sending: _Sending, claim: int, at: int, to: memoryview) -> Callable[[], None]:
        """`backend.StartPiece` for the claims of a slot."""
        first = sending.parts[claim].at + at
        source = sending.slot.raw[first : first + len(to)]
        return self._engine.copy(torch.frombuffer(to, dtype=torch.uint8), source, sending.filled, piece=True)

    def wipe(self) -> None:
        """Zero both sides of every slot. Raises: InternalError while some are in use."""
        self.rewind()
        for slot in self._slots:
            slot.raw.zero_()
            slot.host.zero_()

    def nonzero_bytes(self) -> int:
        return sum(int(torch.count_nonzero(x)) for s in self._slots for x in (s.raw, s.host))


class Layout:
    """Places of arrays in a slot, one after the other, behind the flag."""

    def __init__(self) -> None:
        self.size = _ALIGN

    def add(self, shape: tuple[int, ...], dtype: torch.dtype) -> Part:
        part = Part(None, self.size, shape, dtype)
        self.size += aligned(max(1, prod(shape) * dtype.itemsize))
        return part


def place(slot: Slot, part: Part) -> torch.Tensor:
    """A part on the device."""
    return view(slot.raw, part.at, part.shape, part.dtype)


def named(part: Part, name: str, at: int = 0, shape: tuple[int, ...] | None = None) -> Part:
    """The part as a claim; or a piece of it, `at` bytes from its start."""
    return Part(name, part.at + at, part.shape if shape is None else shape, part.dtype)
