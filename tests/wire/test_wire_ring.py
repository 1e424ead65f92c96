"""The shared ring: order and content, wrap-around, lies about counters, seals, and concurrent changes of the memory."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veriattn.errors import (
    ConfigError,
    InternalError,
    MalformedMessage,
    ProverFault,
    ProverTimeout,
    ProverUnavailable,
    TranscriptMismatch,
)
from veriattn.native import kernels
from veriattn.wire import ring as wr
from veriattn.wire.channel import RingChannel, accept_channel
from veriattn.wire.messages import BadRequest, ErrorCode, Kind, Limits, encode_error
from veriattn.wire.ring import RingGeometry, create_segment, read_geometry

SMALL = RingGeometry(slot_bytes=4096, to_prover_slots=2, from_prover_slots=4)
LIMITS = Limits(64, 4, 1000, 4000, 500)
FROM, HEAD, TAIL = 512, 0, 64


def ring_pair(geometry: RingGeometry = SMALL, timeout_s: float = 5.0) -> tuple[RingChannel, RingChannel]:
    ours, theirs = socket.socketpair()
    verifier = RingChannel.offer(ours, geometry, timeout_s)
    prover = accept_channel(theirs)
    assert isinstance(prover, RingChannel)
    prover.timeout_s = timeout_s
    verifier.send(Kind.HELLO, b"{}")
    assert prover.recv_any(None) == (Kind.HELLO, b"{}")
    return verifier, prover


@pytest.fixture
def pair() -> Iterator[tuple[RingChannel, RingChannel]]:
    verifier, prover = ring_pair()
    with verifier, prover:
        yield verifier, prover


def words(prover: RingChannel) -> wr._Words:
    """What a lying prover has: every word of the shared page."""
    return prover._transport._words  # type: ignore[attr-defined,no-any-return]


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=12), st.sampled_from([(2, 2), (3, 5), (2, 7)]))
@settings(max_examples=40, deadline=None)
def test_any_sizes_arrive_in_order(sizes: list[int], slots: tuple[int, int]) -> None:
    verifier, prover = ring_pair(RingGeometry(4096, *slots))
    payloads = [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)]
    with verifier, prover:
        writer = threading.Thread(target=lambda: [prover.send(Kind.CLAIM, p) for p in payloads])
        writer.start()
        received = [verifier.recv(Kind.CLAIM, size) for size in sizes]
        writer.join()
    assert all(np.array_equal(a, b) for a, b in zip(received, payloads, strict=True))
    assert verifier.bytes_received == sum(sizes) + 32 * len(sizes)


def test_wrap_around_of_both_rings(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    for round_ in range(50):
        ids = bytes([round_]) * 24
        verifier.send(Kind.FREE, ids)
        assert prover.recv_any(LIMITS) == (Kind.FREE, ids)
        data = np.full(1000 + 170 * round_, round_, np.uint8)
        prover.send(Kind.CLAIM, data[:100], data[100:])
        assert np.array_equal(verifier.recv(Kind.CLAIM, data.nbytes), data)


def slots_of(channel: RingChannel) -> bytes:
    """Both rings, without the counters."""
    return bytes(channel._transport._map)[wr.CONTROL_BYTES :]  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.sampled_from("SRWVX"), st.integers(1, 9000)), max_size=40), st.sampled_from([2, 3, 7]))
@settings(max_examples=60, deadline=None)
def test_wiping_leaves_what_is_under_way_and_nothing_else(moves: list[tuple[str, int]], slots: int) -> None:
    """S sends a claim where there is room, R receives one, W and V wipe at the prover and the verifier, X sends a request."""
    verifier, prover = ring_pair(RingGeometry(4096, slots, slots))
    waiting: list[tuple[int, int]] = []
    with verifier, prover:
        for number, (move, size) in enumerate(moves, 1):
            used = sum(-(-(n + 32) // 4096) for _, n in waiting)
            if move == "S" and used + -(-(size + 32) // 4096) <= slots:
                prover.send(Kind.CLAIM, np.full(size, number, np.uint8))
                waiting.append((number, size))
            elif move == "R" and waiting:
                value, count = waiting.pop(0)
                assert set(verifier.recv(Kind.CLAIM, count).tolist()) == {value}
            elif move == "X":
                verifier.send(Kind.FREE, bytes([number]) * 16)
                assert prover.recv_any(LIMITS) == (Kind.FREE, bytes([number]) * 16)
            elif move in "WV":
                (prover if move == "W" else verifier).wipe()
        for value, count in waiting:
            assert set(verifier.recv(Kind.CLAIM, count).tolist()) == {value}
        prover.wipe()
        verifier.wipe()
        assert not any(slots_of(verifier))


def test_wiping_touches_no_slot_that_is_being_read(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover.send(Kind.CLAIM, np.full(5000, 7, np.uint8))
    prover.send(Kind.CLAIM, np.full(3000, 8, np.uint8))
    verifier.expect(Kind.CLAIM, 5000)
    first = np.empty(4500, np.uint8)
    verifier.recv_into(first)
    prover.wipe()
    assert slots_of(verifier)[2 * 4096 :].count(7) == 5000 - (4096 - 32)  # the first slot has been given back
    rest = np.empty(500, np.uint8)
    verifier.recv_into(rest)
    assert set(first.tolist()) == set(rest.tolist()) == {7}
    assert set(verifier.recv(Kind.CLAIM, 3000).tolist()) == {8}


def test_wiping_while_the_other_side_reads() -> None:
    """Many messages through a small ring, wiped after each by the writer: none is damaged."""
    verifier, prover = ring_pair(RingGeometry(4096, 2, 5))

    def write() -> None:
        for number in range(300):
            prover.send(Kind.CLAIM, np.full(100 + 97 * (number % 60), number % 251, np.uint8))
            prover.wipe()

    with verifier, prover:
        writer = threading.Thread(target=write)
        writer.start()
        for number in range(300):
            data = verifier.recv(Kind.CLAIM, 100 + 97 * (number % 60))
            assert (data == number % 251).all()
        writer.join()


def test_a_lying_tail_is_met_by_wiping_too(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    verifier.send(Kind.FREE, bytes(8))
    words(prover).store(256 + TAIL, 1 << 40)
    with pytest.raises(MalformedMessage):
        verifier.wipe()


def test_tiles_arrive_before_the_message_is_complete(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    data = np.arange(20 * 4096, dtype=np.uint32).astype("<u4")  # 80 slots through a ring of 4
    writer = threading.Thread(target=prover.send, args=(Kind.CLAIM, data))
    writer.start()
    verifier.expect(Kind.CLAIM, data.nbytes)
    tile = np.empty(4096, "<u4")
    for index in range(20):
        assert writer.is_alive() or index >= 16  # the ring cannot hold what is still to come
        verifier.recv_into(tile)
        assert np.array_equal(tile, data[index * 4096 : (index + 1) * 4096])
    writer.join()
    prover.send(Kind.CLAIM, b"next")
    assert bytes(verifier.recv(Kind.CLAIM, 4)) == b"next"


@pytest.mark.parametrize("built", [False, True])
def test_two_processes(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if built and wr._native is None:
        pytest.skip("the extension is not built")
    if not built:
        monkeypatch.setattr(wr, "_native", None)
    ours, theirs = socket.socketpair()
    rounds, size = 300, 30_000
    pid = os.fork()
    if pid == 0:
        ours.close()
        channel = accept_channel(theirs)
        channel.recv_any(None)
        for index in range(rounds):
            _, ids = channel.recv_any(LIMITS)
            channel.send(Kind.CLAIM, np.full(size, ids[0] ^ index & 255, np.uint8))
        os._exit(0)
    theirs.close()
    with RingChannel.offer(ours, SMALL, 20.0) as verifier:
        verifier.send(Kind.HELLO, b"{}")
        out = np.empty(size, np.uint8)
        for index in range(rounds):
            verifier.send(Kind.FREE, bytes([index * 7 & 255]) * 8)
            verifier.recv(Kind.CLAIM, size, out)
            assert (out == (index * 7 & 255) ^ index & 255).all()
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("head", [2**64 - 1, 2**63, 100, 6])
def test_head_too_far_ahead(pair: tuple[RingChannel, RingChannel], head: int) -> None:
    verifier, prover = pair
    prover.send(Kind.CLAIM, b"honest")
    assert bytes(verifier.recv(Kind.CLAIM, 6)) == b"honest"  # one slot freed: 5 is the last good value
    words(prover).store(FROM + HEAD, head)
    with pytest.raises(MalformedMessage):
        verifier.recv(Kind.CLAIM, 6)
    with pytest.raises(ProverUnavailable):  # closed for good
        verifier.recv(Kind.CLAIM, 6)


def test_head_backwards(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    for _ in range(2):
        prover.send(Kind.CLAIM, b"honest")
        verifier.recv(Kind.CLAIM, 6)
    words(prover).store(FROM + HEAD, 1)
    with pytest.raises(MalformedMessage):
        verifier.recv(Kind.CLAIM, 6)


@pytest.mark.parametrize("tail", [2**64 - 1, 4])
def test_tail_beyond_what_was_sent(tail: int) -> None:
    verifier, prover = ring_pair()
    with verifier, prover:
        for _ in range(2):
            verifier.send(Kind.FREE, bytes(8))
        words(prover).store(256 + TAIL, tail)
        with pytest.raises(MalformedMessage):
            for _ in range(3):
                verifier.send(Kind.FREE, bytes(8))


def test_tail_backwards() -> None:
    verifier, prover = ring_pair()
    with verifier, prover:
        for _ in range(3):
            verifier.send(Kind.FREE, bytes(8))
            prover.recv_any(LIMITS)
        words(prover).store(256 + TAIL, 0)
        with pytest.raises(MalformedMessage):
            for _ in range(3):
                verifier.send(Kind.FREE, bytes(8))


def test_lies_in_the_words_that_the_verifier_owns_change_nothing(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    for index in range(20):
        for offset in (FROM + TAIL, 256 + HEAD):
            words(prover).store(offset, 2**64 - 1 - index)
        prover._transport._producer._tail = 0  # type: ignore[attr-defined]
        prover._transport._producer._limit = 2**62  # type: ignore[attr-defined]
        prover.send(Kind.CLAIM, bytes([index]) * 50)
        assert bytes(verifier.recv(Kind.CLAIM, 50)) == bytes([index]) * 50


def test_unread_ring_blocks_the_writer_until_its_timeout() -> None:
    verifier, prover = ring_pair(timeout_s=0.1)
    with verifier, prover, pytest.raises(ProverTimeout):
        for _ in range(5):
            verifier.send(Kind.FREE, bytes(8))


def test_flood_of_wake_ups_does_not_extend_the_deadline(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            prover._transport._control.wake()  # type: ignore[attr-defined]

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with pytest.raises(ProverTimeout):
            verifier.recv(Kind.CLAIM, 6, timeout_s=0.2)
    finally:
        stop.set()
        thread.join()


def test_lost_wake_up_does_not_hang(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover._transport._control.wake = lambda: None  # type: ignore[attr-defined]
    timer = threading.Timer(0.05, prover.send, (Kind.CLAIM, b"quiet"))
    timer.start()
    assert bytes(verifier.recv(Kind.CLAIM, 5)) == b"quiet"
    timer.join()


def test_what_was_published_before_the_end_still_counts(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover.send(Kind.CLAIM, b"last words")
    prover.close()
    assert bytes(verifier.recv(Kind.CLAIM, 10)) == b"last words"
    with pytest.raises(ProverUnavailable):
        verifier.recv(Kind.CLAIM, 10)


def test_mutation_while_reading() -> None:
    """Another process rewrites the slots all the time: what is received never changes any more."""
    ours, theirs = socket.socketpair()
    geometry = RingGeometry(4096, 2, 16)
    size, rounds = 8 * 4096 - 32, 200
    pid = os.fork()
    if pid == 0:
        ours.close()
        channel = accept_channel(theirs)
        channel.recv_any(None)
        slots = channel._transport._views[1]  # type: ignore[attr-defined]
        patterns = [bytes([value]) * 4096 for value in (1, 2)]

        def mutate() -> None:
            for index in range(2**62):
                for slot in range(16):
                    slots[slot * 4096 + 32 : (slot + 1) * 4096] = patterns[index & 1][32:]

        threading.Thread(target=mutate, daemon=True).start()
        try:
            while True:
                channel.send(Kind.CLAIM, bytes([3]) * size)
        finally:
            os._exit(0)
    theirs.close()
    with RingChannel.offer(ours, geometry, 20.0) as verifier:
        verifier.send(Kind.HELLO, b"{}")
        shared = np.frombuffer(verifier._transport._views[1], np.uint8)  # type: ignore[attr-defined]
        changed_in_place = touched = 0
        for _ in range(rounds):
            verified = verifier.recv(Kind.CLAIM, size)
            before, view_before = int(verified.sum()), int(shared.sum())
            time.sleep(0.0005)
            assert not np.shares_memory(verified, shared)
            assert int(verified.sum()) == before
            changed_in_place += int(shared.sum()) != view_before
            touched += bool((verified != 3).any())
        # The mutator was at work, or this test shows nothing.
        assert changed_in_place > 0 and touched > 0
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del shared


# -- large messages, which several threads copy ----------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = kernels.get_threads()
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(before)


@given(
    st.lists(
        st.sampled_from([0, 31, 4096, 512 * 1024 - 32, 700_001, MIB - 1, MIB, 2 * MIB + 3, 7 * MIB + 5]), max_size=5
    ),
    st.sampled_from([5, 128, 700, 2048]),
    st.booleans(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_large_messages_over_the_end_of_the_ring(threads: int, sizes: list[int], slots: int, together: bool) -> None:
    """Smaller than the ring, as large and larger; one after the other, and those that are complete in one go."""
    verifier, prover = ring_pair(RingGeometry(4096, 2, slots))
    sizes = [*sizes, 3 * MIB + 9]
    payloads = arrays(*sizes)
    outs = [np.zeros(size + 1, np.uint8)[1:] for size in sizes]  # at odd addresses
    with verifier, prover:
        writer = threading.Thread(target=lambda: [prover.send(Kind.CLAIM, p) for p in payloads])
        writer.start()
        if together:
            verifier.recv_all(Kind.CLAIM, outs, naps=50, nap_s=0.001)
        else:
            for out in outs:
                verifier.recv(Kind.CLAIM, out.nbytes, out)
        writer.join()
        assert all(np.array_equal(a, b) for a, b in zip(outs, payloads, strict=True))
        freed = sum(-(-(size + 32) // 4096) for size in sizes)
        assert words(prover).load(FROM + TAIL) == words(prover).load(FROM + HEAD) == freed


def test_large_messages_in_pieces_of_any_size(threads: int) -> None:
    verifier, prover = ring_pair(RingGeometry(4096, 2, 600))
    data = np.random.default_rng(3).integers(0, 256, 9 * MIB + 1, np.uint8)
    with verifier, prover:
        writer = threading.Thread(target=prover.send, args=(Kind.CLAIM, data))
        writer.start()
        verifier.expect(Kind.CLAIM, data.nbytes)
        out, at = np.zeros(data.nbytes, np.uint8), 0
        for size in (1, 3 * MIB + 7, 511 * 1024, MIB, 4 * MIB - 1, data.nbytes):
            end = min(at + size, data.nbytes)
            verifier.recv_into(out[at:end])
            at = end
        writer.join()
    assert np.array_equal(out, data)


@pytest.mark.parametrize("head", [0, 256, 257 + 640 + 1, 2**63, 2**64 - 1])
def test_lies_about_the_head_inside_a_large_message(threads: int, head: int) -> None:
    """Half of the message lies there honestly and is copied; then the counter falls back, or runs ahead of the ring."""
    verifier, prover = ring_pair(RingGeometry(4096, 2, 640))
    with verifier, prover:
        consumer = verifier._transport._consumer  # type: ignore[attr-defined]
        ring = np.frombuffer(prover._transport._views[1], np.uint8)  # type: ignore[attr-defined]
        ring[:] = 9
        words(prover).store(FROM + HEAD, 257)
        first, rest = np.zeros(257 * 4096, np.uint8), np.zeros(2 * MIB, np.uint8)
        consumer.read_into(memoryview(first), None)
        assert (first == 9).all() and words(prover).load(FROM + TAIL) == 257
        words(prover).store(FROM + HEAD, head)
        with pytest.raises(MalformedMessage):
            consumer.read_into(memoryview(rest), time.monotonic() + 5)
        assert not rest.any()
        del ring


def test_slots_of_a_message_that_is_taken_are_free_again(threads: int) -> None:
    """As large as the ring, twice: the second needs what the first gave back."""
    verifier, prover = ring_pair(RingGeometry(4096, 2, 1024))
    size = 4 * MIB - 32
    payloads, outs = arrays(size, size), [np.zeros(size, np.uint8) for _ in range(2)]
    with verifier, prover:
        for payload, out in zip(payloads, outs, strict=True):
            prover.send_all(Kind.CLAIM, [payload])
            verifier.recv_all(Kind.CLAIM, [out])
            assert np.array_equal(out, payload)
            ring = np.frombuffer(prover._transport._views[1], np.uint8)  # type: ignore[attr-defined]
            ring[:] = 0  # what comes after the copy
            assert np.array_equal(out, payload)
            del ring
        assert words(prover).load(FROM + TAIL) == 2048


# -- the segment ---------------------------------------------------------------------------------------------------


def test_seals_hold() -> None:
    fd = create_segment(SMALL)
    try:
        for size in (0, SMALL.segment_bytes - 1, SMALL.segment_bytes + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", SMALL.segment_bytes)
        assert read_geometry(fd) == SMALL
    finally:
        os.close(fd)


def truncate_under_reader(fd: int, size: int) -> int:
    """Wait status of a process that maps the segment, lets it be truncated and reads its last page."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        mapped = mmap.mmap(fd, size)
        try:
            os.ftruncate(fd, 0)
        except PermissionError:
            os._exit(errno.EPERM if mapped[size - 1] == 0 else 1)
        mapped[size - 1]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_truncation_under_the_reader() -> None:
    fd = create_segment(SMALL)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, 8192)
    try:
        assert truncate_under_reader(fd, SMALL.segment_bytes) == errno.EPERM
        assert truncate_under_reader(unsealed, 8192) == -signal.SIGBUS  # what the seal is for
    finally:
        os.close(fd)
        os.close(unsealed)


def test_a_hole_punched_into_the_segment_reads_as_zeros(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover.send(Kind.CLAIM, b"x" * 100)
    prover._transport._map.madvise(mmap.MADV_REMOVE)  # type: ignore[attr-defined]
    with pytest.raises((MalformedMessage, ProverTimeout)):
        verifier.recv(Kind.CLAIM, 100, timeout_s=0.1)


def test_nothing_stays_behind() -> None:
    def count() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("veriattn-ring" in line for line in maps)

    before = count()
    for _ in range(5):
        verifier, prover = ring_pair()
        assert count()[1] == before[1] + 2
        verifier.close()
        prover.close()
        prover.close()
    assert count() == before


@pytest.mark.parametrize(
    "sizes", [(4095, 2, 2), (0, 2, 2), (4096, 1, 2), (4096, 2, 0), (1 << 25, 2, 2), (4096, 2, 1 << 40)]
)
def test_geometry_refuses(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        RingGeometry(*sizes)


def test_prover_refuses_a_segment_that_could_be_truncated() -> None:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SMALL.segment_bytes)
        os.pwrite(fd, wr._pack_geometry(SMALL), 0)
        with pytest.raises(BadRequest):
            read_geometry(fd)
    finally:
        os.close(fd)


# --- several messages at once ----------------------------------------------------------------------------------------


def arrays(*sizes: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i, size in enumerate(sizes)]


@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=9), st.sampled_from([(2, 2), (3, 5), (2, 64)]), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_messages_at_once_are_those_one_by_one(sizes: list[int], slots: tuple[int, int], together: bool) -> None:
    """Either end may use either way; rings that are too small for all, or for one, are met too."""
    verifier, prover = ring_pair(RingGeometry(4096, *slots))
    payloads = arrays(*sizes)
    outs = [np.empty(size, np.uint8) for size in sizes]
    with verifier, prover:
        if together:
            writer = threading.Thread(target=lambda: prover.send_all(Kind.CLAIM, payloads))
        else:
            writer = threading.Thread(target=lambda: [prover.send(Kind.CLAIM, p) for p in payloads])
        writer.start()
        verifier.recv_all(Kind.CLAIM, outs, naps=1)
        writer.join()
        assert all(np.array_equal(a, b) for a, b in zip(outs, payloads, strict=True))
        assert verifier.bytes_received == prover.bytes_sent == sum(sizes) + 32 * len(sizes)
        writer = threading.Thread(target=lambda: prover.send_all(Kind.CLAIM, payloads))
        writer.start()
        received = [verifier.recv(Kind.CLAIM, size) for size in sizes]
        writer.join()
        assert all(np.array_equal(a, b) for a, b in zip(received, payloads, strict=True))


def test_an_unexpected_message_among_several_is_named(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    payloads = arrays(10, 11, 12)
    prover.send_all(Kind.CLAIM, payloads)
    outs = [np.zeros(10, np.uint8), np.zeros(10, np.uint8), np.zeros(12, np.uint8)]
    with pytest.raises(TranscriptMismatch, match="message 1"):
        verifier.recv_all(Kind.CLAIM, outs)
    assert np.array_equal(outs[0], payloads[0]) and not outs[1].any()
    with pytest.raises(ProverUnavailable):
        verifier.recv_all(Kind.CLAIM, outs)


def test_an_error_message_among_several_is_reported(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover.send_all(Kind.CLAIM, arrays(10))
    prover.send(Kind.ERROR, encode_error(ErrorCode.INTERNAL, "out of luck"))
    with pytest.raises(ProverFault, match="out of luck"):
        verifier.recv_all(Kind.CLAIM, [np.empty(10, np.uint8), np.empty(11, np.uint8)])


def test_missing_messages_meet_the_deadline(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    prover.send_all(Kind.CLAIM, arrays(10))
    with pytest.raises(ProverTimeout):
        verifier.recv_all(Kind.CLAIM, [np.empty(10, np.uint8), np.empty(11, np.uint8)], 0.05, naps=3)


@pytest.mark.parametrize("head", [0, 6, 2**63, 2**64 - 1])
def test_lies_about_the_head_are_met_by_several_at_once(pair: tuple[RingChannel, RingChannel], head: int) -> None:
    verifier, prover = pair
    out = [np.empty(10, np.uint8)]
    prover.send_all(Kind.CLAIM, arrays(10))
    verifier.recv_all(Kind.CLAIM, out)
    words(prover).store(FROM + HEAD, head)
    with pytest.raises(MalformedMessage):
        verifier.recv_all(Kind.CLAIM, out, 0.2)


def test_a_waiting_reader_is_woken_by_several_at_once(pair: tuple[RingChannel, RingChannel]) -> None:
    verifier, prover = pair
    payloads, outs = arrays(10, 20), [np.empty(10, np.uint8), np.empty(20, np.uint8)]
    reader = threading.Thread(target=lambda: verifier.recv_all(Kind.CLAIM, outs))
    reader.start()
    time.sleep(0.02)
    prover.send_all(Kind.CLAIM, payloads)
    reader.join(5.0)
    assert not reader.is_alive() and np.array_equal(outs[1], payloads[1])


def test_misuse_of_the_native_path_is_refused(pair: tuple[RingChannel, RingChannel]) -> None:
    consumer = pair[0]._transport._consumer  # type: ignore[attr-defined]
    good = (consumer._words.page, FROM, consumer._data, 4096)
    out = [np.empty(1, np.uint8)]
    assert kernels.ring_take(*good, 0, 0, bytes(32), out) == (0, 0, 0, False)
    for bad in [
        (*good[:1], FROM + 8, *good[2:], 0, 0, bytes(32), out),
        (*good[:1], 4096 - 64, *good[2:], 0, 0, bytes(32), out),
        (*good[:3], 4095, 0, 0, bytes(32), out),
        (*good[:3], 1 << 20, 0, 0, bytes(32), out),
        (*good, 1, 1, bytes(32), out),
        (*good, 8192, 1, bytes(32), out),
        (*good, 0, 0, bytes(31), out),
        (*good, 0, 0, bytes(64), out),
        (*good, 0, 0, bytes(32), [b"read only"]),
        (*good, 0, 0, bytes(32), [np.empty((4, 4), np.uint8)[:, :2]]),
    ]:
        with pytest.raises(InternalError):
            kernels.ring_take(*bad)
    with pytest.raises(InternalError):
        kernels.ring_put(*good, 4096, 2, bytes(32), out)
