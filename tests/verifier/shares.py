"""What tests of split attention share: provers in a thread, scripts of steps, the right logits."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.engine.strategies import FullTeeExecutor, TeeWeights
from veriattn.prover.backend import ClaimSink
from veriattn.prover.finder import ModelFinder
from veriattn.prover.serve import ChannelSink, cpu_backend, serve
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.reference import F32
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.wire.channel import Channel, StreamChannel, accept_channel

FLOWS = (Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP)
VOCABULARY = 307
MakeSink = Callable[[Channel], ClaimSink]


class ThreadProver:
    """A prover in a thread of this process, so that a test can change what it does."""

    pid: int | None = None
    isolation = None

    def __init__(self, path: Path, make_sink: MakeSink = ChannelSink) -> None:
        ours, theirs = socket.socketpair()
        finder = ModelFinder([path])

        def run() -> None:
            channel = accept_channel(theirs)
            try:
                # Nothing is wiped at the end of a sequence: the verifier's kernels run in this process, and are running then.
                serve(channel, lambda hello: cpu_backend(hello, finder), make_sink, wipe=lambda: None)
            finally:
                channel.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self.channel: Channel = StreamChannel.offer(ours, 60.0)

    def output_tail(self) -> str:
        return ""

    def terminate(self) -> None:
        self.channel.close()
        self._thread.join(10)


def tokens(seq: int, n: int) -> list[int]:
    return [(7 * i + 13 * seq + i // 11) % (VOCABULARY - 4) + 4 for i in range(n)]


def steps(lengths: tuple[int, ...], chunk: int, decode: int) -> list[Batch]:
    """Chunked prefill of the first sequence beside the whole of the others, then decode steps of all."""
    out = []
    for at in range(0, lengths[0], chunk):
        n = min(chunk, lengths[0] - at)
        entries = [BatchEntry(0, at, tuple(tokens(0, lengths[0])[at : at + n]), "last")]
        if at == 0:
            entries += [
                BatchEntry(s, 0, tuple(tokens(s, n)), "all" if s == 2 else "last") for s, n in enumerate(lengths) if s
            ]
        out.append(Batch(tuple(entries)))
    for i in range(decode):
        out.append(Batch(tuple(BatchEntry(s, n + i, (11 + i + s,)) for s, n in enumerate(lengths))))
    return out


class Truth:
    """Logits of scripts without any prover, each computed once."""

    def __init__(self, path: Path) -> None:
        self._weights = TeeWeights(path)
        self._known: dict[tuple[tuple[int, ...], int, int], list[F32]] = {}

    def __call__(self, lengths: tuple[int, ...], chunk: int, decode: int) -> list[F32]:
        key = (lengths, chunk, decode)
        if key not in self._known:
            executor = FullTeeExecutor(self._weights, 1 << 16, 8)
            self._known[key] = [executor.run(b) for b in steps(*key)]
        return self._known[key]


def play(session: Session, batches: list[Batch]) -> list[F32]:
    with session:
        return [session.run(b) for b in batches]


def same(got: list[F32], expected: list[F32]) -> bool:
    return len(got) == len(expected) and all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def settings(**changes: Any) -> SessionConfig:
    return SessionConfig(**{"max_tokens_per_step": 4096, "max_sequences": 8, **changes})
