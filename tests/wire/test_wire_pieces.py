"""Claims that something else than the sending thread writes into the ring, a device's copy engine: never published early."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.wire.test_wire_ring import LIMITS, ring_pair

from veriattn.errors import InternalError, MalformedMessage
from veriattn.trace import Trace
from veriattn.wire import ring as wr
from veriattn.wire.channel import RingChannel, StreamChannel, accept_channel
from veriattn.wire.messages import BadRequest, Kind, VerifierGone
from veriattn.wire.ring import RingGeometry


class Engine:
    """Writes at the last moment: when somebody waits for a piece. What is published before that is read as it was."""

    def __init__(self, payloads: list[np.ndarray[tuple[int], np.dtype[np.uint8]]]) -> None:
        self.payloads = payloads
        self.under_way = 0
        self.most = 0
        self.pieces: list[tuple[int, int, int]] = []

    def start(self, message: int, at: int, to: memoryview) -> Callable[[], None]:
        self.pieces.append((message, at, len(to)))
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def wait() -> None:
            to[:] = memoryview(self.payloads[message][at : at + len(to)])
            self.under_way -= 1

        return wait


def payloads_of(sizes: list[int]) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    return [np.random.default_rng(i + 1).integers(1, 256, size, np.uint8) for i, size in enumerate(sizes)]


@pytest.fixture
def pair() -> Iterator[tuple[RingChannel, RingChannel]]:
    verifier, prover = ring_pair()
    with verifier, prover:
        yield verifier, prover


@given(
    st.lists(st.lists(st.integers(0, 40_000), min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from([(2, 2), (3, 5), (2, 64)]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_sizes_arrive_whole(groups: list[list[int]], slots: tuple[int, int], at_once: bool) -> None:
    """Between messages that are written the usual way, over the end of the ring, in rings smaller than a message."""
    verifier, prover = ring_pair(RingGeometry(4096, *slots))
    engines = [Engine(payloads_of(sizes)) for sizes in groups]
    received = []

    def write() -> None:
        for engine, sizes in zip(engines, groups, strict=True):
            prover.send_pieces(Kind.CLAIM, sizes, engine.start)
            prover.send(Kind.CLAIM, b"between")

    with verifier, prover:
        writer = threading.Thread(target=write)
        writer.start()
        for sizes in groups:
            outs = [np.zeros(size, np.uint8) for size in sizes]
            if at_once:
                verifier.recv_all(Kind.CLAIM, outs)
            else:
                for out in outs:
                    verifier.recv(Kind.CLAIM, out.nbytes, out)
            received.append(outs)
            assert bytes(verifier.recv(Kind.CLAIM, 7)) == b"between"
        writer.join()
        assert prover.bytes_sent == verifier.bytes_received
    for engine, outs in zip(engines, received, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(outs, engine.payloads, strict=True))
        assert engine.under_way == 0


def test_several_pieces_are_under_way() -> None:
    """A copy engine is kept busy, a ring not filled by one piece, and a claim cut only where it must be."""
    verifier, prover = ring_pair(RingGeometry(4096, 2, 64))
    engine = Engine(payloads_of([1 << 20, 10]))
    with verifier, prover:
        writer = threading.Thread(target=prover.send_pieces, args=(Kind.CLAIM, [1 << 20, 10], engine.start))
        writer.start()
        for payload in engine.payloads:
            assert np.array_equal(verifier.recv(Kind.CLAIM, payload.nbytes), payload)
        writer.join()
    assert 2 <= engine.most <= 4
    assert max(size for *_, size in engine.pieces) == 64 * 4096 // 4
    assert [p for p in engine.pieces if p[0] == 1] == [(1, 0, 10)]
    assert sum(size for message, _, size in engine.pieces if message == 0) == 1 << 20


def test_a_piece_that_fails_before_anything_was_published(pair: tuple[RingChannel, RingChannel]) -> None:
    """The reader has seen nothing of it; the link is not used again, since nobody knows what still writes to it."""
    verifier, prover = pair

    def start(message: int, at: int, to: memoryview) -> Callable[[], None]:
        def wait() -> None:
            raise InternalError("the device fell off the bus")

        return wait

    with pytest.raises(InternalError, match="fell off"):
        prover.send_pieces(Kind.CLAIM, [100], start)
    assert prover._transport._words.load(wr._FROM_PROVER + wr._HEAD) == 0  # type: ignore[attr-defined]
    with pytest.raises(VerifierGone):
        prover.send(Kind.CLAIM, b"x")
    verifier.abort()


def test_a_lying_tail_is_met(pair: tuple[RingChannel, RingChannel]) -> None:
    """Whoever moves the reader's counter beyond what was published would have pieces overwrite what was not read."""
    verifier, prover = pair
    words = prover._transport._words  # type: ignore[attr-defined]
    engine = Engine(payloads_of([40_000]))

    def start(message: int, at: int, to: memoryview) -> Callable[[], None]:
        words.store(wr._FROM_PROVER + wr._TAIL, 9)
        return engine.start(message, at, to)

    with pytest.raises(BadRequest, match="tail counter"):
        prover.send_pieces(Kind.CLAIM, [40_000], start)
    verifier.abort()


def test_a_head_that_lies_is_met_as_ever(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover._transport._words.store(wr._FROM_PROVER + wr._HEAD, 5)  # type: ignore[attr-defined]
    with pytest.raises(MalformedMessage):
        verifier.recv(Kind.CLAIM, 10)


def test_a_socket_has_no_memory_for_others() -> None:
    ours, theirs = socket.socketpair()
    with StreamChannel.offer(ours, 5.0) as verifier, accept_channel(theirs) as prover:
        verifier.send(Kind.HELLO, b"{}")
        assert prover.recv_any(None)[0] is Kind.HELLO
        assert prover.outgoing_memory is None
        with pytest.raises(InternalError, match="no memory"):
            prover.send_pieces(Kind.CLAIM, [4], Engine(payloads_of([4])).start)


def test_memory_is_that_of_the_ring_from_the_prover(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    memory = prover.outgoing_memory
    assert memory is not None and len(memory) == 4 * 4096
    prover.send(Kind.CLAIM, b"seen")
    assert bytes(memory[32:36]) == b"seen"
    assert bytes(verifier.recv(Kind.CLAIM, 4)) == b"seen"


@pytest.mark.parametrize("link", ["ring", "stream"])
def test_pending(link: str) -> None:
    """What decides whether a prover sends its last claims now or begins with the next request."""
    ours, theirs = socket.socketpair()
    offer = RingChannel.offer if link == "ring" else StreamChannel.offer
    verifier = offer(ours, timeout_s=5.0)
    with verifier, accept_channel(theirs) as prover:
        assert not prover.pending
        verifier.send(Kind.HELLO, b"{}")
        assert prover.pending
        prover.recv_any(None)
        assert not prover.pending
        verifier.send(Kind.FREE, bytes(24))
        verifier.send(Kind.FREE, bytes(8))
        prover.recv_any(LIMITS)
        assert prover.pending
        prover.recv_any(LIMITS)
        assert not prover.pending
        verifier.abort()
        if link == "stream":
            assert prover.pending  # the end: whoever reads meets it
        with pytest.raises(VerifierGone):
            prover.recv_any(LIMITS)


def test_a_trace_shows_messages_that_left_together(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    trace = Trace("prover")
    prover.set_trace(trace)
    trace.label = "layers.3"
    prover.send_all(Kind.CLAIM, [np.zeros(10, np.uint8), np.zeros(20, np.uint8)])
    prover.send_pieces(Kind.CLAIM, [100], Engine(payloads_of([100])).start)
    assert [(s.kind, s.label) for s in trace.spans] == [
        ("send", "layers.3"),
        ("compute", "layers.3"),
        ("send", "layers.3"),
    ]
    for size in (10, 20, 100):
        verifier.recv(Kind.CLAIM, size)
