"""Channels over both transports against a peer that lies, stalls, dies or sends garbage."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from veriattn.errors import (
    InternalError,
    MalformedMessage,
    ProverFault,
    ProverTimeout,
    ProverUnavailable,
    TranscriptMismatch,
    UsageError,
    VeriattnError,
)
from veriattn.wire.channel import Channel, RingChannel, StreamChannel, accept_channel, inherited_channel
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import HEADER, MAGIC, BadRequest, Kind, Limits, VerifierGone, encode_error
from veriattn.wire.ring import RingGeometry
from veriattn.wire.stream import StreamTransport, listen, parse_address

LIMITS = Limits(64, 4, 1000, 4000, 500)
PAYLOAD = bytes(range(200))
Opener = Callable[[socket.socket], Channel]


def open_ring(sock: socket.socket) -> Channel:
    return RingChannel.offer(sock, RingGeometry(4096, 2, 4), 5.0)


def open_stream(sock: socket.socket) -> Channel:
    return StreamChannel.offer(sock, 5.0)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


def open_slow_ring(sock: socket.socket) -> Channel:
    return RingChannel.offer(sock, RingGeometry(4096, 2, 4), 5.0, Throttle(6, 20))


def open_slow_stream(sock: socket.socket) -> Channel:
    return StreamChannel.offer(sock, 5.0, Throttle(6, 20))


TRANSPORTS = {
    "ring": (socket.socketpair, open_ring),
    "unix": (socket.socketpair, open_stream),
    "tcp": (tcp_pair, open_stream),
    "slow-ring": (socket.socketpair, open_slow_ring),
    "slow-tcp": (tcp_pair, open_slow_stream),
}


@pytest.fixture(params=TRANSPORTS)
def link(request: pytest.FixtureRequest) -> tuple[Callable[[], tuple[socket.socket, socket.socket]], Opener]:
    return TRANSPORTS[request.param]


@pytest.fixture
def pair(link: tuple[Callable[[], tuple[socket.socket, socket.socket]], Opener]) -> Iterator[tuple[Channel, Channel]]:
    connect, open_ = link
    ours, theirs = connect()
    verifier = open_(ours)
    prover = accept_channel(theirs)
    prover.timeout_s = 5.0
    with verifier, prover:
        verifier.send(Kind.HELLO, b"{}")
        assert prover.recv_any(None) == (Kind.HELLO, b"{}")
        yield verifier, prover


def raw_send(channel: Channel, *parts: bytes) -> None:
    channel._transport.write_message([memoryview(p) for p in parts if p], time.monotonic() + 5)


def frame(prover: Channel, payload: bytes = PAYLOAD, **changes: int) -> tuple[bytes, bytes]:
    """An honest frame of the prover, but for the changes."""
    fields = {"magic": MAGIC, "kind": Kind.CLAIM, "flags": 0, "session": prover.session, "seq": 0, "size": len(payload)}
    return HEADER.pack(*(fields | changes).values()), payload


def test_messages_arrive(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    assert prover.session == verifier.session
    assert verifier.bytes_sent == prover.bytes_received == 34
    prover.send(Kind.READY, PAYLOAD[:64])
    assert bytes(verifier.recv(Kind.READY, 64)) == PAYLOAD[:64]
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    prover.send(Kind.CLAIM, rows[:1], b"", np.empty((0, 4)), rows[1:])
    out = np.empty((3, 4), np.int32)
    assert verifier.recv(Kind.CLAIM, 48, out) is out
    assert np.array_equal(out, rows)
    prover.send(Kind.LOGITS)
    assert verifier.recv(Kind.LOGITS, 0).size == 0
    assert verifier.bytes_received == prover.bytes_sent == 96 + 80 + 32
    verifier.send(Kind.FREE, b"a" * 8, b"b" * 8)
    verifier.send(Kind.SHUTDOWN)
    assert prover.recv_any(LIMITS) == (Kind.FREE, b"a" * 8 + b"b" * 8)
    assert prover.recv_any(LIMITS) == (Kind.SHUTDOWN, b"")


def test_large_messages_in_pieces(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    data = np.random.default_rng(1).integers(0, 256, 3_000_001, np.uint8)
    writer = threading.Thread(target=prover.send, args=(Kind.CLAIM, data))
    writer.start()
    verifier.expect(Kind.CLAIM, data.nbytes)
    got, sizes = [], [1, 100, 4063, 70_000, 0]
    sizes[-1] = data.nbytes - sum(sizes)
    for size in sizes:
        piece = bytearray(size)
        verifier.recv_into(piece)
        got.append(bytes(piece))
    writer.join()
    assert b"".join(got) == data.tobytes()


def test_one_thread_sends_while_another_receives(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair

    def echo() -> None:
        for _ in range(300):
            prover.send(Kind.CLAIM, prover.recv_any(LIMITS)[1])

    sender = threading.Thread(target=lambda: [verifier.send(Kind.FREE, bytes([i & 255]) * 16) for i in range(300)])
    threads = [threading.Thread(target=echo), sender]
    for thread in threads:
        thread.start()
    for index in range(300):
        assert bytes(verifier.recv(Kind.CLAIM, 16)) == bytes([index & 255]) * 16
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"magic": MAGIC ^ 1}, MalformedMessage),
        ({"flags": 1}, MalformedMessage),
        ({"session": 0}, MalformedMessage),
        ({"kind": Kind.LOGITS}, TranscriptMismatch),
        ({"kind": Kind.HELLO}, TranscriptMismatch),
        ({"kind": 65535}, TranscriptMismatch),
        ({"seq": 1}, TranscriptMismatch),
        ({"seq": 2**64 - 1}, TranscriptMismatch),
        ({"size": 199}, TranscriptMismatch),
        ({"size": 201}, TranscriptMismatch),
        ({"size": 0}, TranscriptMismatch),
        ({"size": 2**64 - 1}, TranscriptMismatch),
        ({"kind": Kind.ERROR}, TranscriptMismatch),  # of the wrong size
    ],
)
def test_header_that_is_not_the_expected_one(
    pair: tuple[Channel, Channel], changes: dict[str, int], error: type[VeriattnError]
) -> None:
    verifier, prover = pair
    raw_send(prover, *frame(prover, **changes))
    with pytest.raises(VeriattnError) as caught:
        verifier.recv(Kind.CLAIM, len(PAYLOAD))
    assert type(caught.value) is error
    with pytest.raises(ProverUnavailable):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))
    with pytest.raises(ProverUnavailable):
        verifier.send(Kind.SHUTDOWN)


def test_the_unchanged_frame_passes(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    raw_send(prover, *frame(prover))
    assert bytes(verifier.recv(Kind.CLAIM, len(PAYLOAD))) == PAYLOAD


def test_duplicate(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    for _ in range(2):
        raw_send(prover, *frame(prover))
    verifier.recv(Kind.CLAIM, len(PAYLOAD))
    with pytest.raises(TranscriptMismatch):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))


def test_reordered(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    raw_send(prover, *frame(prover, seq=1))
    raw_send(prover, *frame(prover, seq=0))
    with pytest.raises(TranscriptMismatch):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))


def test_spliced_from_another_session(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    ours, theirs = socket.socketpair()
    with open_stream(ours) as other, accept_channel(theirs):
        assert other.session != verifier.session
        raw_send(prover, *frame(prover, session=other.session or 0))
    with pytest.raises(MalformedMessage):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))


def test_error_message_of_the_prover(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    prover.send(Kind.ERROR, encode_error(4, "out of \x1b[31mmemory\n"))
    with pytest.raises(ProverFault) as caught:
        verifier.recv(Kind.CLAIM, len(PAYLOAD))
    assert caught.value.code == "prover_fault"
    assert caught.value.message == "the prover reports error 4: out of [31mmemory"


def test_replayed_error_message_is_out_of_order(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    raw_send(prover, *frame(prover, encode_error(1, "x"), kind=Kind.ERROR, seq=7))
    with pytest.raises(TranscriptMismatch):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 231])
def test_truncated_then_silence(pair: tuple[Channel, Channel], size: int) -> None:
    verifier, prover = pair
    whole = b"".join(frame(prover, PAYLOAD * 100))
    cut = whole[: size * 60 if size == 231 else size]
    if cut and isinstance(prover, RingChannel):
        # A ring publishes whole slots: the rest of the last one is what lay there before.
        cut = whole[: 4096 * 2]
    raw_send(prover, cut)
    with pytest.raises(ProverTimeout):
        verifier.recv(Kind.CLAIM, 20_000, timeout_s=0.1)


def test_wiping_a_stream_leaves_what_has_not_been_read(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    transport = prover._transport
    if not isinstance(transport, StreamTransport):
        pytest.skip("rings are wiped in test_wire_ring")
    raw_send(
        verifier,
        *[
            part
            for i in (1, 2)
            for part in (HEADER.pack(MAGIC, Kind.FREE, 0, verifier.session, i, 16), bytes([i] * 16))
        ],
    )
    assert prover.recv_any(LIMITS) == (Kind.FREE, bytes([1] * 16))
    prover.wipe()
    verifier.wipe()
    assert not bytes(transport._buffer).count(1)
    assert prover.recv_any(LIMITS) == (Kind.FREE, bytes([2] * 16))
    prover.wipe()
    assert not any(transport._buffer)


def test_dripping_link_meets_the_deadline(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    if isinstance(verifier, RingChannel):
        pytest.skip("a ring moves whole slots")
    whole, stop = b"".join(frame(prover, PAYLOAD * 1000)), threading.Event()

    def drip() -> None:
        for byte in whole:
            if stop.wait(0.001):
                return
            raw_send(prover, bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(ProverTimeout):
            verifier.recv(Kind.CLAIM, 200_000, timeout_s=0.2)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("published", [0, 1])
def test_killed_peer(link: tuple[Callable[[], tuple[socket.socket, socket.socket]], Opener], published: int) -> None:
    connect, open_ = link
    ours, theirs = connect()
    pid = os.fork()
    if pid == 0:
        ours.close()
        channel = accept_channel(theirs)
        channel.recv_any(None)
        for _ in range(published):
            channel.send(Kind.CLAIM, PAYLOAD)
        signal.pause()
    theirs.close()
    with open_(ours) as verifier:
        verifier.send(Kind.HELLO, b"{}")
        for _ in range(published):
            assert bytes(verifier.recv(Kind.CLAIM, len(PAYLOAD))) == PAYLOAD
        timer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
        timer.start()
        with pytest.raises(ProverUnavailable):
            verifier.recv(Kind.CLAIM, len(PAYLOAD))
        timer.join()
        os.waitpid(pid, 0)


def test_killed_while_the_verifier_sends(
    link: tuple[Callable[[], tuple[socket.socket, socket.socket]], Opener],
) -> None:
    connect, open_ = link
    ours, theirs = connect()
    pid = os.fork()
    if pid == 0:
        ours.close()
        signal.pause()
    theirs.close()
    with open_(ours) as verifier:
        timer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
        timer.start()
        with pytest.raises(ProverUnavailable):
            for _ in range(4):  # an emulated link takes 64 MiB ahead
                verifier.send(Kind.STEP, np.zeros(33 << 20, np.uint8))
        timer.join()
        os.waitpid(pid, 0)


def test_abort_from_another_thread(pair: tuple[Channel, Channel]) -> None:
    verifier, _ = pair
    timer = threading.Timer(0.05, verifier.abort)
    timer.start()
    with pytest.raises(ProverUnavailable):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))
    timer.join()


def test_garbage(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    raw_send(prover, random.Random(5).randbytes(5000))
    with pytest.raises(MalformedMessage):
        verifier.recv(Kind.CLAIM, len(PAYLOAD))


def test_prover_ends_with_its_verifier(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    verifier.close()
    with pytest.raises(VerifierGone):
        prover.recv_any(LIMITS)


@pytest.mark.parametrize(
    "changes",
    [{"magic": 0}, {"flags": 1}, {"session": 0}, {"seq": 2}, {"kind": Kind.HELLO}, {"kind": Kind.LINEAR},
     {"kind": Kind.CLAIM}, {"kind": 999}, {"size": 2**64 - 1}, {"size": 33}],
)  # fmt: skip
def test_prover_refuses(pair: tuple[Channel, Channel], changes: dict[str, int]) -> None:
    verifier, prover = pair
    honest = {"kind": Kind.FREE, "seq": 1, "size": 8}
    raw_send(verifier, *frame(prover, bytes(8), **(honest | changes)))
    with pytest.raises(BadRequest):
        prover.recv_any(LIMITS)


def test_prover_takes_the_unchanged_twin(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    raw_send(verifier, *frame(prover, bytes(8), kind=Kind.FREE, seq=1))
    assert prover.recv_any(LIMITS) == (Kind.FREE, bytes(8))


def test_misuse_is_told_apart_from_faults(pair: tuple[Channel, Channel]) -> None:
    verifier, prover = pair
    with pytest.raises(InternalError):
        verifier.recv_any(LIMITS)
    with pytest.raises(InternalError):
        prover.recv(Kind.CLAIM, 0)
    with pytest.raises(InternalError):
        verifier.recv(Kind.CLAIM, 200, np.empty(199, np.uint8))
    prover.send(Kind.CLAIM, PAYLOAD)
    verifier.expect(Kind.CLAIM, 200)
    with pytest.raises(InternalError):
        verifier.recv_into(bytearray(201))
    with pytest.raises(InternalError):
        verifier.expect(Kind.CLAIM, 200)
    got = bytearray(200)
    verifier.recv_into(got)
    assert bytes(got) == PAYLOAD


def test_sessions_are_random() -> None:
    sessions = set()
    for _ in range(20):
        ours, theirs = socket.socketpair()
        with open_stream(ours) as channel, theirs:
            sessions.add(channel.session)
    assert len(sessions) == 20 and max(s or 0 for s in sessions) > 2**48


@pytest.mark.parametrize("greeting", [b"", b"VAG1", b"VAG1" + bytes(12), b"XXXX\2" + bytes(11), b"VAG1\1" + bytes(11)])
def test_bad_greeting(greeting: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(greeting)
    ours.shutdown(socket.SHUT_WR)
    with ours, theirs, pytest.raises((BadRequest, VerifierGone)):
        accept_channel(theirs)


def test_connect_over_tcp_and_unix(tmp_path: Path) -> None:
    for given in (f"unix://{tmp_path}/prover.sock", "tcp://127.0.0.1:0"):
        server = listen(given)
        address = given if given.startswith("unix") else f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with server, StreamChannel.connect(address, 5.0) as verifier, accept_channel(server.accept()[0]) as prover:
            verifier.send(Kind.HELLO, b"{}")
            assert prover.recv_any(None)[0] == Kind.HELLO
            with pytest.raises(UsageError):
                listen(address)
        with pytest.raises(ProverUnavailable):
            StreamChannel.connect(address, 1.0)


def test_vsock_loopback() -> None:
    try:
        server = listen("vsock://1:52731")
        server.settimeout(2.0)
        channel = StreamChannel.connect("vsock://1:52731", 2.0)
    except (UsageError, ProverUnavailable):
        pytest.skip("no vsock loopback in this kernel")
    with server, channel as verifier, accept_channel(server.accept()[0]) as prover:
        verifier.send(Kind.HELLO, b"{}")
        assert prover.recv_any(None)[0] == Kind.HELLO


def test_addresses() -> None:
    assert parse_address("tcp://[::1]:80") == (socket.AF_INET6, ("::1", 80))
    assert parse_address("vsock://2:5000") == (socket.AF_VSOCK, (2, 5000))
    for bad in (
        "",
        "tcp://",
        "tcp://h",
        "tcp://h:x",
        "tcp://h:70000",
        "unix://x",
        "vsock://a:1",
        "http://h:1",
        "tcp://h:²",
    ):
        with pytest.raises(UsageError):
            parse_address(bad)


@pytest.mark.parametrize("value", [None, "", "x", "-1", "99999"])
def test_prover_without_a_descriptor(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("VERIATTN_PROVER_FD", raising=False)
    if value is not None:
        monkeypatch.setenv("VERIATTN_PROVER_FD", value)
    with pytest.raises(VeriattnError) as caught:
        inherited_channel()
    assert caught.value.code == "config"
