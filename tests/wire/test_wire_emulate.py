"""The emulated link: bytes are usable no earlier than rate and delay allow, and no later."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from veriattn.errors import ProverTimeout, UsageError
from veriattn.wire import emulate
from veriattn.wire.channel import Channel, RingChannel, StreamChannel, accept_channel
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import Kind, Limits
from veriattn.wire.ring import RingGeometry

SLOW = Throttle(0.01, 1000)  # 10 MB/s, 1 ms
LIMITS = Limits(64, 4, 1000, 4000, 500)


@pytest.fixture(params=["ring", "stream"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    verifier: Channel
    if request.param == "ring":
        verifier = RingChannel.offer(ours, RingGeometry(4096, 4, 256), 5.0, SLOW)
    else:
        verifier = StreamChannel.offer(ours, 5.0, SLOW)
    prover = accept_channel(theirs)
    prover.timeout_s = 5.0
    with verifier, prover:
        verifier.send(Kind.HELLO, b"{}")
        prover.recv_any(None)
        yield verifier, prover


def test_pipe_arithmetic() -> None:
    pipe = emulate._Pipe(Throttle(1, 10))  # 1 GB/s, 10 us
    assert pipe.arrival(1_000_000, 5.0) == pytest.approx(5.001010)
    assert pipe.arrival(1_000_000, 5.0) == pytest.approx(5.002010)  # behind the first
    assert pipe.arrival(1_000_000, 9.0) == pytest.approx(9.001010)  # the pipe was idle


class Written:
    """A transport of which nothing is known but what a test says was seen."""

    read_wait_s = 0.0

    def written_position(self) -> int:
        return -1

    def abort(self) -> None:
        """Nobody waits."""

    close = abort


@pytest.mark.parametrize("rate", [1.0, 0.1, 10.0])
def test_arrivals_are_those_of_bytes_one_by_one(rate: float) -> None:
    """Bytes enter the link when they were seen: runs of them together as each by itself."""
    rng = np.random.default_rng(4)
    runs, times = rng.integers(1, 500, 200), np.cumsum(rng.exponential(3e-7, 200))
    seen = np.repeat(times, runs)
    throttle = Throttle(rate, 3)
    link = emulate.EmulatedTransport(Written(), throttle)  # type: ignore[arg-type]
    try:
        link._positions[:], link._times[:] = np.cumsum(runs).tolist(), times.tolist()
        free_at, at = 0.0, 37
        for end in [*sorted(rng.integers(38, seen.size, 30).tolist()), seen.size]:
            for sent_at in seen[at:end].tolist():
                free_at = max(free_at, sent_at) + 1 / throttle.bytes_per_s
            if end > at:
                assert link._arrival(at, end) == pytest.approx(free_at + 3e-6, rel=1e-9)
            at = end
        before = time.monotonic()
        assert link._arrival(at, at + 1000) >= before + 1000 / throttle.bytes_per_s
    finally:
        link.close()


def test_times_that_are_past_are_forgotten() -> None:
    link = emulate.EmulatedTransport(Written(), Throttle(1))  # type: ignore[arg-type]
    try:
        link._positions[:], link._times[:] = range(10, 200_010, 10), [1.0 + i for i in range(20_000)]
        assert link._arrival(0, 150_003) == pytest.approx(15_001.0)
        assert link._positions[0] == 150_010 and link._times[0] == 15_001.0
        assert link._arrival(150_003, 150_010) == pytest.approx(15_001.0)
        assert link._arrival(150_010, 150_020) == pytest.approx(15_002.0)
    finally:
        link.close()


def test_bytes_do_not_come_early(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    data = np.arange(500_000, dtype=np.uint8)
    start = time.monotonic()
    writer = threading.Thread(target=prover.send, args=(Kind.CLAIM, data))
    writer.start()
    assert np.array_equal(verifier.recv(Kind.CLAIM, data.nbytes), data)
    assert time.monotonic() - start >= 0.050 + 0.001
    writer.join()


def test_requests_do_not_come_early_and_do_not_block(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    limits = Limits(1_000_000, 4, 1000, 4000, 500)
    start = time.monotonic()
    verifier.send(Kind.STEP, np.zeros(200_000, np.uint8))
    assert verifier._transport._queued_bytes > 0  # type: ignore[attr-defined]
    prover.recv_any(limits)
    assert time.monotonic() - start >= 0.020 + 0.001


def test_what_crossed_while_the_verifier_was_busy_is_there(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, prover = pair
    data = np.arange(100_000, dtype=np.uint8)
    prover.send(Kind.CLAIM, data)
    written = verifier._transport._inner.written_position  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while not verifier._transport._positions or written() < data.nbytes:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.1)  # ten times what the transfer takes
    dues: list[float] = []
    monkeypatch.setattr(emulate, "_sleep_until", dues.append)
    before = time.monotonic()
    assert np.array_equal(verifier.recv(Kind.CLAIM, data.nbytes), data)
    assert dues and max(dues) < before


def test_a_link_too_slow_for_the_deadline(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    writer = threading.Thread(target=prover.send, args=(Kind.CLAIM, bytes(500_000)))
    writer.start()
    with pytest.raises(ProverTimeout):
        verifier.recv(Kind.CLAIM, 500_000, timeout_s=0.02)
    writer.join()


def test_close_delivers_what_was_sent() -> None:
    ours, theirs = socket.socketpair()
    verifier = RingChannel.offer(ours, RingGeometry(4096, 4, 4), 5.0, Throttle(0.0001, 1_000_000))
    with accept_channel(theirs) as prover:
        for kind in (Kind.HELLO, Kind.SHUTDOWN):
            verifier.send(kind)
        closer = threading.Thread(target=verifier.close)
        closer.start()
        assert prover.recv_any(None)[0] == Kind.HELLO
        assert prover.recv_any(LIMITS)[0] == Kind.SHUTDOWN
        closer.join()


def test_parse() -> None:
    assert Throttle.parse("0.5") == Throttle(0.5, 0.0)
    assert Throttle.parse("16,2.5") == Throttle(16.0, 2.5)
    for bad in ("", "x", "1,2,3", "0", "-1", "nan", "1,-1", "inf"):
        with pytest.raises(UsageError):
            Throttle.parse(bad)
