"""Fuzz the wire: mutated messages into every decoder, mutated frames and counters into every channel. `--seconds N`.

Only errors of the package's own tree may come out, each input within its deadline and a bound on memory. An input that
breaks this is kept in the corpus folder, which every run replays first.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from veriattn.errors import InternalError, VeriattnError
from veriattn.spec.model import ModelConfig
from veriattn.wire import messages as wm
from veriattn.wire import operations as wo
from veriattn.wire import split as ws
from veriattn.wire.channel import Channel, RingChannel, StreamChannel, accept_channel
from veriattn.wire.ring import RingGeometry
from veriattn.wire.transport import Role

LIMITS = wm.Limits(max_tokens_per_step=256, max_sequences=8, max_positions=4096, kv_tokens=65536, vocab_size=1000)
CONFIG = ModelConfig(16, 2, 4, 2, 4, 24, 1000, 4096, 4, 1e-5)
GEOMETRY = RingGeometry(4096, 2, 4)
MEMORY_BYTES = 4 << 20
SECONDS_EACH = 2.0
SPECIAL = (0, 1, 2, 0x7F, 0x80, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def seeds() -> list[bytes]:
    """One valid payload of each kind."""
    entries = (wm.StepEntry(1, 0, 3, wm.LogitRows.LAST), wm.StepEntry(2, 9, 1, wm.LogitRows.ALL))
    step = wm.Step(4, wm.Mode.CLAIMS, wm.AttentionCheck.TRANSFER, entries, np.array([1, 2, 3, 4], np.int32))
    hello = wm.Hello(1, 7, "/models/x", "0f" * 32, wm.Mode.CLAIMS, LIMITS)
    ready = wm.encode_ready(wm.Ready(1, 1, 1, "cpu"))
    plain = [wm.encode_hello(hello), wm.encode_step(step), wm.encode_free([1, 2]), ready, wm.encode_error(1, "text")]
    return plain + [joined(pieces) for pieces in operation_seeds()]


def joined(pieces: Iterable[wm.Buffer]) -> bytes:
    """A payload that is sent in pieces."""
    return b"".join(bytes(wm.byte_view(piece)) for piece in pieces)


def operation_seeds() -> list[list[wm.Buffer]]:
    """One valid request of each single operation."""
    rng = np.random.default_rng(0)

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(-127, 128, shape, dtype=np.int8)

    scale = np.ones
    runs = (wo.Run(1, 0, 2), wo.Run(7, 40, 1))
    attend = wo.AttendRequest(
        1, 1, 1, wo.Reply.SCORES_AND_OUTPUTS, 2, runs, ints(3, 2, 4), scale((3, 2), np.float32), ints(3, 1, 4),
        scale((3, 1), np.float32), ints(3, 1, 4),
    )  # fmt: skip
    return [
        wo.encode_linear(wo.LinearRequest(3, ints(2, 24))),
        wo.encode_attend(attend),
        wo.encode_weights(wo.WeightsRequest(1, 9, rng.integers(0, 16385, (4, 2, 5)).astype(np.uint16))),
        ws.encode_split(ws.SplitRequest(1, 1, 1, 3, 2, False, ints(1, 4, 4), scale((1, 4), np.float32))),
        ws.encode_split(ws.SplitRequest(1, 1, 2, 3, 2, True, None, None)),
        ws.encode_key_block(ints(2, 3, 4), scale((2, 3), np.float32)),
        ws.encode_value_block(ints(2, 3, 4)),
    ]


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """A few local changes: bytes, words of special value, cuts, copies, insertions."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                size = rng.choice((1, 2, 4, 8))
                data[at : at + size] = (rng.choice(SPECIAL) % 256**size).to_bytes(size, "little")
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 4:
                other = rng.randrange(len(data) + 1)
                data[at:at] = data[other : other + rng.randint(1, 64)]
            case 5:
                del data[at:]
    return bytes(data[:8192])


def decode(raw: bytes) -> None:
    """Every decoder; what a decoder of the prover accepts must encode to the same bytes."""
    cases: list[tuple[Callable[[], object], Callable[..., bytes] | None]] = [
        (lambda: wm.decode_hello(raw), wm.encode_hello),
        (lambda: wm.decode_step(raw, LIMITS), wm.encode_step),
        (lambda: wm.decode_free(raw, LIMITS), wm.encode_free),
        (lambda: wm.decode_ready(raw, 1), None),
        (lambda: wm.decode_error(raw), None),
        (lambda: wo.decode_linear(raw, CONFIG, LIMITS), lambda m: joined(wo.encode_linear(m))),
        (lambda: wo.decode_attend(raw, CONFIG, LIMITS), lambda m: joined(wo.encode_attend(m))),
        (lambda: wo.decode_weights(raw, CONFIG, LIMITS), lambda m: joined(wo.encode_weights(m))),
        (lambda: ws.decode_split(raw, CONFIG, LIMITS), lambda m: joined(ws.encode_split(m))),
        (lambda: ws.decode_key_block(raw, 3, CONFIG), lambda m: joined(ws.encode_key_block(*m))),
        (lambda: ws.decode_value_block(raw, 3, CONFIG), lambda m: joined(ws.encode_value_block(m))),
    ]
    for run, encode in cases:
        try:
            message = run()
        except InternalError:
            raise
        except VeriattnError:
            continue
        if encode is not None and encode(message) != raw:
            raise AssertionError("a message with two encodings was accepted")


def open_pair(ring: bool) -> tuple[Channel, Channel]:
    """A verifier and a prover in this process, past HELLO."""
    ours, theirs = socket.socketpair()
    verifier = RingChannel.offer(ours, GEOMETRY, 0.02) if ring else StreamChannel.offer(ours, 0.02)
    prover = accept_channel(theirs)
    verifier.send(wm.Kind.HELLO, b"{}")
    prover.recv_any(None)
    return verifier, prover


def frames(raw: bytes) -> None:
    """`raw` says what a hostile side does; the other reads honestly until its first error."""
    rng = random.Random(raw)
    ring, to_verifier = rng.random() < 0.5, rng.random() < 0.7
    verifier, prover = open_pair(ring)
    with verifier, prover:
        hostile, reader = (prover, verifier) if to_verifier else (verifier, prover)
        try:
            for seq in range(rng.randint(1, 4)):
                payload = bytes(rng.choice((0, 8, 64, 100)))
                kind = wm.Kind.CLAIM if to_verifier else wm.Kind.FREE
                header = wm.encode_header(kind, hostile.session or 0, seq + (not to_verifier), len(payload))
                frame = header + payload
                if rng.random() < 0.6:
                    frame = mutate(rng, frame)
                if frame:
                    hostile._transport.write_message([memoryview(frame)], time.monotonic() + 0.02)
                if ring and rng.random() < 0.3:
                    offset = rng.choice((256, 512)) + 64 * rng.randrange(4)
                    hostile._transport._words.store(offset, rng.choice((*SPECIAL, rng.randrange(8))))  # type: ignore[attr-defined]
                if reader._role is Role.VERIFIER:
                    reader.recv(kind, len(payload), timeout_s=0.005)
                else:
                    reader.recv_any(LIMITS, timeout_s=0.005)
        except InternalError:
            raise
        except VeriattnError:
            return


def run_one(raw: bytes) -> None:
    """Raises: whatever breaks the promise."""
    start = time.monotonic()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    decode(raw)
    frames(raw)
    if tracemalloc.get_traced_memory()[1] - before > MEMORY_BYTES:
        raise AssertionError("more memory than the limits allow")
    if time.monotonic() - start > SECONDS_EACH:
        raise AssertionError("too slow")


def fuzz(seconds: float, seed: int, corpus: Path, inputs: int | None = None) -> int:
    """Number of inputs tried. Raises: what `run_one` raises, after keeping the input."""
    rng = random.Random(seed)
    corpus.mkdir(parents=True, exist_ok=True)
    pool = seeds() + [path.read_bytes() for path in sorted(corpus.glob("*.bin"))]
    tracemalloc.start()
    count, end = 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end and (inputs is None or count < inputs):
            raw = pool[count] if count < len(pool) else mutate(rng, rng.choice(pool))
            count += 1
            try:
                run_one(raw)
            except Exception:
                path = corpus / f"{seed}-{count}.bin"
                path.write_bytes(raw)
                print(f"kept as {path}", file=sys.stderr)
                raise
    finally:
        tracemalloc.stop()
    return count


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--corpus", type=Path, default=Path("tests/wire/corpus"))
    options = parser.parse_args()
    count = fuzz(options.seconds, options.seed, options.corpus)
    print(f"{count} inputs in {options.seconds:g} s, seed {options.seed}: no crash, no hang, memory bounded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
