"""Memory that is made once and reused: room for activations, and slots through which claims leave the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

import torch
from veriattn.errors import InternalError, NumericsError
from veriattn.prover.backend import ClaimSink

_ALIGN = 256


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
        workspace.uploads.append(self)

    def __call__(self, arrays: Sequence[np.ndarray[Any, Any]]) -> list[torch.Tensor]:
        """Views on the device, in order. The previous upload must have been used up."""
        offsets, size = [], 0
        for a in arrays:
            offsets.append(size)
            size += aligned(a.nbytes)
        if self.host.numel() < size:
            self.host = torch.zeros(2 * size, dtype=torch.uint8, pin_memory=self._pin)
        host = self.host.numpy()
        for a, at in zip(arrays, offsets, strict=True):
            host[at : at + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        raw = self._workspace.get(self._name, (size,), torch.uint8)
        raw.copy_(self.host[:size], non_blocking=True)
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


class Slot:
    """Device memory that kernels write claims into, and the pinned memory that it is copied to. The first word is the flag."""

    def __init__(self, device: torch.device, pin: bool) -> None:
        self._device, self._pin = device, pin
        self.raw = torch.zeros(0, dtype=torch.uint8, device=device)
        self.host = torch.zeros(0, dtype=torch.uint8)
        self.copied: torch.cuda.Event | None = torch.cuda.Event() if device.type == "cuda" else None

    def fit(self, size: int, host_size: int) -> bool:
        """Make it that large; True if it moved."""
        moved = False
        if self.raw.numel() < size:
            self.raw.zero_()
            self.raw = torch.zeros(aligned(size), dtype=torch.uint8, device=self._device)
            moved = True
        if self.host.numel() < host_size:
            self.host.zero_()
            self.host = torch.zeros(aligned(host_size), dtype=torch.uint8, pin_memory=self._pin)
        return moved


class Outbox:
    """A few slots in turn: kernels fill one while others are copied (on a stream of their own) or sent.

    The device runs ahead of what has been sent by as many slots as there are.
    """

    def __init__(self, device: torch.device, slots: int = 3) -> None:
        self._cuda = device.type == "cuda"
        self._slots = [Slot(device, self._cuda) for _ in range(slots)]
        self._busy: deque[tuple[Slot, list[Part], ClaimSink | None]] = deque()
        self._next = 0
        self._copies = torch.cuda.Stream(device) if self._cuda else None
        self.results: list[np.ndarray[Any, Any]] = []
        #: Counts how often a slot has moved.
        self.moves = 0

    def take(self, size: int, host_size: int) -> Slot:
        """The next slot in turn; sends the oldest if all are in use. Raises: as `flush`."""
        if len(self._busy) == len(self._slots):
            self._send_oldest()
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        if slot.fit(size, host_size):
            self.moves += 1
        return slot

    def rewind(self) -> None:
        """Begin with the first slot: a step that is repeated then meets the same addresses. Raises: InternalError
        while some are in use."""
        if self._busy:
            raise InternalError("claims are still on their way")
        self._next = 0

    def submit(self, slot: Slot, size: int, parts: list[Part], sink: ClaimSink | None) -> None:
        """Copy the first `size` bytes to the host once the kernels queued so far are through; send them in order."""
        if self._copies is None or slot.copied is None:
            slot.host[:size].copy_(slot.raw[:size])
        else:
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                slot.host[:size].copy_(slot.raw[:size], non_blocking=True)
                slot.copied.record()
        self._busy.append((slot, parts, sink))

    def flush(self) -> list[np.ndarray[Any, Any]]:
        """Send everything; returns the parts that were not claims. Raises: NumericsError; what the sink raises."""
        while self._busy:
            self._send_oldest()
        results, self.results = self.results, []
        return results

    def drop(self) -> None:
        """After an error: wait for the copies and forget what was not sent."""
        if self._cuda:
            torch.cuda.synchronize()
        self._busy.clear()
        self.results = []

    def _send_oldest(self) -> None:
        slot, parts, sink = self._busy.popleft()
        if slot.copied is not None:
            slot.copied.synchronize()
        if int(view(slot.host, 0, (1,), torch.int32)[0]):
            raise NumericsError(
                "an activation is not finite or is 2**40 or larger",
                hint="the model does not fit the canonical numerics; convert it again and look at its quality report",
            )
        values = [view(slot.host, part.at, part.shape, part.dtype).numpy() for part in parts]
        together = getattr(sink, "claim_layer", None)
        if together is not None and all(part.name is not None for part in parts):
            together(values)
            return
        for part, array in zip(parts, values, strict=True):
            if part.name is None:
                self.results.append(array.copy())
            elif sink is not None:
                sink.claim(part.name, array)

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
