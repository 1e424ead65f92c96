"""`python -m benchmarks.copyin`: claims out of a real ring between two processes, with one thread and with all.

Three ways: a writer that copies each message into the ring; a ring that is always full, as where a device writes it; and
that into memory which is new for each message. The median of several messages of 100 MB.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import numpy as np

from veriattn.native import get_threads, kernels, set_threads
from veriattn.wire.channel import Channel, RingChannel, accept_channel
from veriattn.wire.messages import Kind

SIZE, ROUNDS = 100_000_000, 15


def write_messages(channel: Channel) -> None:
    """Claims one after the other, for as long as they are taken."""
    payload = np.arange(SIZE, dtype=np.uint8)
    while True:
        channel.send(Kind.CLAIM, payload)


def keep_full(channel: Channel) -> None:
    """Only the counter moves: whatever is read is at once there again."""
    ring = channel._transport._producer  # type: ignore[attr-defined]
    ring._data[:] = b"\5" * len(ring._data)
    while True:
        head = ring._words.load(ring._base + 64) + ring._num_slots
        if head * ring._slot > ring._pos:
            ring._pos = head * ring._slot
            ring._publish(head)
        time.sleep(50e-6)  # far less than reading the ring takes; the core may be a reader's


def rate(writer: Callable[[Channel], None], threads: int, fresh: bool = False) -> float:
    """Bytes a second."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        set_threads(1)
        channel = accept_channel(theirs)
        channel.recv_any(None)
        try:
            writer(channel)
        finally:
            os._exit(0)
    theirs.close()
    set_threads(threads)
    out, taken = np.zeros(SIZE, np.uint8), []
    with RingChannel.offer(ours) as verifier:
        verifier.send(Kind.HELLO, b"{}")
        for _ in range(ROUNDS):
            if fresh:
                del out
            start = time.monotonic()
            if fresh:
                out = np.empty(SIZE, np.uint8)
            verifier._transport.read_into(memoryview(out), None)
            verifier._transport.end_message()
            taken.append(time.monotonic() - start)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return SIZE / float(np.median(taken[2:]))


def main() -> int:
    words, every = np.ones(1 << 25, np.uint64), get_threads()
    reading = []
    for _ in range(10):
        start = time.monotonic()
        kernels.read_words(words)
        reading.append(time.monotonic() - start)
    print(f"reading memory, 1 thread{words.nbytes / min(reading) / 1e9:36.1f} GB/s")
    for threads in sorted({1, every}):
        for name, writer, fresh in (
            ("from a process that writes", write_messages, False),
            ("from a full ring", keep_full, False),
            ("from a full ring, into new memory", keep_full, True),
        ):
            print(f"{threads:3} threads, {name:40}{rate(writer, threads, fresh) / 1e9:8.1f} GB/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
