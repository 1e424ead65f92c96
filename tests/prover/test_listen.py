"""A listening prover: models by digest, several verifiers, links that stall, drop, drip or carry garbage, reconnecting."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import Strategy
from veriattn.errors import (
    ConfigError,
    MalformedMessage,
    ModelError,
    ProverFault,
    ProverTimeout,
    ProverUnavailable,
    TranscriptMismatch,
    UsageError,
    VeriattnError,
    VerificationError,
)
from veriattn.prover.finder import ModelFinder
from veriattn.spec.modelfile import read_manifest
from veriattn.wire.emulate import Throttle
from veriattn.wire.stream import parse_address

PROMPT = tuple(int(t) for t in np.random.default_rng(0).integers(0, 256, 40))
STRATEGIES: list[Strategy] = ["run-ahead", "veriattn", "tsdp"]
Listening = Callable[..., contextlib.AbstractContextManager[str]]


def generate(model: Path, address: str, strategy: Strategy = "run-ahead", **settings: object) -> list[int]:
    config = EngineConfig(strategy=strategy, prover_address=address, retries=0, **settings)  # type: ignore[arg-type]
    with Engine(model, config) as engine:
        return engine.generate([Request(PROMPT, max_tokens=5, ignore_eos=True)])[0].output_ids


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[int]:
    with Engine(tiny_model, EngineConfig(strategy="full-tee")) as engine:
        return engine.generate([Request(PROMPT, max_tokens=5, ignore_eos=True)])[0].output_ids


# -- models and addresses ---------------------------------------------------------------------------------------------


def test_finder(make_model: Callable[..., Path], tmp_path: Path) -> None:
    one, two = make_model(0), make_model(5)
    (tmp_path / "a").symlink_to(one)
    (tmp_path / "b").symlink_to(two)
    (tmp_path / "c").mkdir()
    (tmp_path / "file").write_text("no model")
    finder = ModelFinder([tmp_path / "missing", tmp_path])
    assert finder.find(read_manifest(two).digest).resolve() == two
    assert ModelFinder([one]).find(read_manifest(one).digest) == one
    with pytest.raises(ModelError, match="no model"):
        finder.find("0" * 64)
    with pytest.raises(ModelError):
        finder.find("../" + "0" * 61)


def test_model_by_digest(make_model: Callable[..., Path], listening_prover: str) -> None:
    """The prover has another copy of the model and never learns our path; a model that it lacks is a clear error."""
    with pytest.raises(ProverFault, match="error 2: this prover has no model"):
        generate(make_model(77), listening_prover)


def test_the_verifiers_path_does_not_travel(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[bytes] = []

        def eavesdrop() -> None:
            connection, _ = server.accept()
            with connection:
                while chunk := connection.recv(65536):
                    seen.append(chunk)
                    if b"vocab_size" in b"".join(seen):
                        return

        thread = threading.Thread(target=eavesdrop)
        thread.start()
        with pytest.raises(ProverUnavailable):
            generate(tiny_model, f"tcp://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    hello = b"".join(seen)
    assert b'"model_path":""' in hello
    assert str(tiny_model).encode() not in hello


def test_unix_socket(tiny_model: Path, tmp_path: Path, start_listening: Listening, expected: list[int]) -> None:
    address = f"unix://{tmp_path}/prover"
    with start_listening(tiny_model, address) as got:
        assert got == address
        assert generate(tiny_model, address) == expected
    assert not (tmp_path / "prover").exists()


@pytest.mark.skipif(not Path("/dev/vsock").exists(), reason="the kernel has no vsock device")
def test_vsock(tiny_model: Path, start_listening: Listening, expected: list[int]) -> None:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.bind((1, 40123))
    except OSError:
        pytest.skip("no local vsock transport")
    with start_listening(tiny_model, "vsock://1:40123"):
        assert generate(tiny_model, "vsock://1:40123") == expected


def test_vsock_address() -> None:
    assert parse_address("vsock://3:7707") == (socket.AF_VSOCK, (3, 7707))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "http://x:1", "tcp://127.0.0.1:99999", "vsock://host:1"])
def test_bad_addresses(address: str, tiny_model: Path) -> None:
    with pytest.raises(UsageError):
        generate(tiny_model, address)


def test_nobody_there(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"tcp://127.0.0.1:{port}", f"unix://{tmp_path}/none", "tcp://no-such-host.invalid:1"):
        with pytest.raises(ProverUnavailable, match="no prover answers"):
            generate(tiny_model, address)


def test_an_address_excludes_a_command(tiny_model: Path) -> None:
    with pytest.raises(ConfigError):
        Engine(tiny_model, EngineConfig(prover_address="tcp://127.0.0.1:1", prover_threads=1))


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_one_after_the_other(tiny_model: Path, start_listening: Listening, expected: list[int]) -> None:
    """One session at a time: the second verifier waits in the backlog until the first is done."""
    with start_listening(tiny_model, sessions=1) as address:
        results: list[list[int]] = []
        with Engine(tiny_model, EngineConfig(prover_address=address)) as first:
            first.start()
            waiting = threading.Thread(target=lambda: results.append(generate(tiny_model, address)))
            waiting.start()
            results.append(first.generate([Request(PROMPT, max_tokens=5, ignore_eos=True)])[0].output_ids)
            assert len(results) == 1
        waiting.join(60)
        assert results == [expected, expected]


def test_garbage_does_not_keep_it_from_others(
    tiny_model: Path, start_listening: Listening, expected: list[int]
) -> None:
    with start_listening(tiny_model, sessions=1) as address:
        family, target = parse_address(address)
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(16), b"\xff" * 100_000):
            with socket.socket(family, socket.SOCK_STREAM) as s:
                s.connect(target)  # type: ignore[arg-type]
                with contextlib.suppress(OSError):
                    s.sendall(garbage)
        assert generate(tiny_model, address) == expected


# -- bad links --------------------------------------------------------------------------------------------------------

Mangle = Callable[[int, bytes], Iterator[bytes]]


@contextlib.contextmanager
def proxy(address: str, mangle: Mangle, connections: int = 1) -> Iterator[str]:
    """A link that treats what the prover sends: `mangle(bytes so far, chunk)` yields what goes on, and raises
    ConnectionError to close the link. Connections after the first `connections` are honest."""
    family, target = parse_address(address)
    server = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    open_sockets: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket, treat: Mangle | None) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(4096):
                for piece in [chunk] if treat is None else treat(done, chunk):
                    sink.sendall(piece)
                done += len(chunk)
        for s in (source, sink):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        count = 0
        while True:
            try:
                ours, _ = server.accept()
            except OSError:
                return
            theirs = socket.socket(family, socket.SOCK_STREAM)
            theirs.connect(target)  # type: ignore[arg-type]
            open_sockets.extend((ours, theirs))
            treat = mangle if count < connections else None
            count += 1
            for source, sink, how in ((ours, theirs, None), (theirs, ours, treat)):
                threads.append(threading.Thread(target=pump, args=(source, sink, how), daemon=True))
                threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        acceptor.join()
        for s in open_sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for s in open_sockets:
            s.close()


def cut(at: int, then: Callable[[], None]) -> Mangle:
    """Everything up to byte `at`, then `then()`; what follows is lost."""

    def mangle(done: int, chunk: bytes) -> Iterator[bytes]:
        if done < at:
            yield chunk[: at - done]
        if done + len(chunk) > at:
            then()

    return mangle


def drop() -> None:
    raise ConnectionError


def stall() -> None:
    return


def slowly(done: int, chunk: bytes) -> Iterator[bytes]:
    """Torn at odd places, with pauses."""
    for at in range(0, len(chunk), 701):
        time.sleep(0.0002)
        yield chunk[at : at + 701]


def flip(at: int) -> Mangle:
    def mangle(done: int, chunk: bytes) -> Iterator[bytes]:
        data = bytearray(chunk)
        if done <= at < done + len(chunk):
            data[at - done] ^= 1
        yield bytes(data)

    return mangle


def insert(at: int) -> Mangle:
    def mangle(done: int, chunk: bytes) -> Iterator[bytes]:
        if done <= at < done + len(chunk):
            yield chunk[: at - done] + b"\0" + chunk[at - done :]
        else:
            yield chunk

    return mangle


#: READY is 32 + 64 bytes; then the first claim's header (magic at 96, kind at 100, session at 104, seq at 112,
#: size at 120) and its payload from 128 on.
GARBAGE: dict[str, tuple[Mangle, type[VeriattnError]]] = {
    "ready-magic": (flip(1), MalformedMessage),
    "ready-kind": (flip(4), TranscriptMismatch),
    "ready-version": (flip(36), ProverFault),
    "magic": (flip(96), MalformedMessage),
    "kind": (flip(100), TranscriptMismatch),
    "flags": (flip(102), MalformedMessage),
    "session": (flip(107), MalformedMessage),
    "seq": (flip(112), TranscriptMismatch),
    "size": (flip(123), TranscriptMismatch),
    "payload": (flip(128), VerificationError),
    "late-payload": (flip(100_000), ProverFault),
    "one-more-byte": (insert(128), ProverFault),
    "noise": (lambda done, chunk: iter([bytes(np.random.default_rng(done).bytes(len(chunk)))]), MalformedMessage),
}


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_garbage(what: str, strategy: Strategy, tiny_model: Path, listening_prover: str) -> None:
    mangle, error = GARBAGE[what]
    with proxy(listening_prover, mangle) as address, pytest.raises(error):
        generate(tiny_model, address, strategy, step_timeout_s=20.0)


@pytest.mark.parametrize("at", [0, 50, 96, 110, 5000, 100_000])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_link_that_drops(at: int, strategy: Strategy, tiny_model: Path, listening_prover: str) -> None:
    with proxy(listening_prover, cut(at, drop)) as address, pytest.raises(ProverUnavailable):
        generate(tiny_model, address, strategy)


@pytest.mark.parametrize("at", [96, 110, 5000, 100_000])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_link_that_stalls(at: int, strategy: Strategy, tiny_model: Path, listening_prover: str) -> None:
    with proxy(listening_prover, cut(at, stall)) as address, pytest.raises(ProverTimeout):
        generate(tiny_model, address, strategy, step_timeout_s=0.5)


def test_a_link_that_stalls_at_the_start(tiny_model: Path, listening_prover: str) -> None:
    with proxy(listening_prover, cut(0, stall)) as address, pytest.raises(ProverTimeout):
        generate(tiny_model, address, start_timeout_s=0.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("throttle", [None, Throttle(0.1, 100)])
def test_a_link_that_is_slow(
    throttle: Throttle | None, strategy: Strategy, tiny_model: Path, listening_prover: str, expected: list[int]
) -> None:
    with proxy(listening_prover, slowly) as address:
        assert generate(tiny_model, address, strategy, emulate_link=throttle) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reconnect(strategy: Strategy, tiny_model: Path, listening_prover: str, expected: list[int]) -> None:
    """A link that breaks in the middle is replaced: fresh session, fresh keys, the same tokens, none of them twice."""
    after_the_prompt = {"run-ahead": 155_000, "veriattn": 157_000, "tsdp": 235_000}[strategy]  # bytes, in the decode
    with proxy(listening_prover, cut(after_the_prompt, drop)) as address:
        config = EngineConfig(strategy=strategy, prover_address=address, retries=1)
        with Engine(tiny_model, config) as engine:
            request = engine.submit(Request(PROMPT, max_tokens=5, ignore_eos=True))
            engine.start()
            first = engine.executor
            got = []
            for out in engine.stream(request):
                got.append(out.token_id)
                assert engine.restarts == 0 or len(got) > 1
            assert engine.restarts == 1
            assert engine.executor is not first
            sessions = [e.session for e in (first, engine.executor)]  # type: ignore[union-attr]
            assert sessions[0].closed
            assert sessions[0].channel.session != sessions[1].channel.session
            assert sessions[0]._keys is not sessions[1]._keys
    assert got == expected
