"""The whole CUDA backend beside the CPU backend: every claim, every logit, bit for bit, on whichever device is asked for."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import Bits

from veriattn.prover.backend import Backend, StartPiece
from veriattn.prover.cpu import CpuBackend
from veriattn.prover.cuda import memory
from veriattn.prover.cuda.backend import CudaBackend
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.model import ModelConfig
from veriattn.spec.modelfile import read_manifest
from veriattn.wire.messages import AttentionCheck
from veriattn.wire.operations import AttendRequest, LinearRequest, LoadRequest, Reply, Run, WeightsRequest

Claim = tuple[str, tuple[int, ...], str, bytes]


class Collected:
    """A sink that keeps copies."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []

    def claim(self, name: str, values: np.ndarray[Any, Any]) -> None:
        assert values.flags.c_contiguous
        self.claims.append((name, values.shape, values.dtype.str, values.tobytes()))


class Shared(Collected):
    """A sink with memory that the device writes claims into by itself, in small pieces, as a ring has it."""

    def __init__(self, piece_bytes: int = 1 << 16) -> None:
        super().__init__()
        self._map = mmap.mmap(-1, 1 << 22)
        self._piece_bytes = piece_bytes
        self.straight = 0

    @property
    def memory(self) -> memoryview | None:
        return memoryview(self._map)

    def claim_group(self, name: str, claims: Sequence[np.ndarray[Any, Any]]) -> None:
        for values in claims:
            self.claim(name, values)

    def claim_pieces(self, name: str, sizes: Sequence[int], start: StartPiece) -> None:
        self.straight += 1
        for claim, size in enumerate(sizes):
            whole = bytearray()
            while len(whole) < size:
                count = min(self._piece_bytes, size - len(whole))
                place = self.memory[len(self.claims) % 7 :][:count]  # type: ignore[index]
                start(claim, len(whole), place)()
                whole += place
            self.claims.append((name, (size,), "bytes", bytes(whole)))


def same_claims(got: list[Claim], expected: list[Claim]) -> None:
    assert [c[:3] for c in got] == [c[:3] for c in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours[3] == theirs[3], ours[0]


class Pair:
    """Both backends over one model, given the same requests."""

    def __init__(self, path: Path, device: str, **limits: int) -> None:
        limits = {"kv_tokens": 4096, "max_sequences": 8} | limits
        digest = read_manifest(path).digest
        self.cpu: Backend = CpuBackend(path, expected_digest=digest, **limits)
        self.cuda = CudaBackend(path, expected_digest=digest, device=device, **limits)
        self.config: ModelConfig = self.cuda.config

    def step(self, check: AttentionCheck, *entries: BatchEntry) -> None:
        self.steps(check, [entries])

    def steps(self, check: AttentionCheck, steps: Sequence[Sequence[BatchEntry]]) -> None:
        """Steps that the prover knows beforehand: the claims of one may leave while the next is computed."""
        sinks = Collected(), Collected()
        for backend, sink in zip((self.cpu, self.cuda), sinks, strict=True):
            for entries in steps:
                backend.step(Batch(tuple(entries)), check, sink)
            backend.finish()
        same_claims(sinks[1].claims, sinks[0].claims)

    def ask(self, operation: str, request: object) -> None:
        sinks = Collected(), Collected()
        for backend, sink in zip((self.cpu, self.cuda), sinks, strict=True):
            getattr(backend, operation)(request, sink)
            backend.finish()
        assert sinks[0].claims
        same_claims(sinks[1].claims, sinks[0].claims)

    def free(self, *seq_ids: int) -> None:
        for backend in (self.cpu, self.cuda):
            for seq_id in seq_ids:
                backend.free(seq_id)
                assert backend.length(seq_id) == 0


def tokens(config: ModelConfig, name: str, count: int) -> tuple[int, ...]:
    return tuple(Bits(name).integers(0, config.vocab_size - 1, count).tolist())


def check_steps(pair: Pair, long: int) -> None:
    """Prefill in chunks of several sequences, mixed with decode, both ways to check attention; then nothing is left
    in memory."""
    c = pair.config
    replay, transfer = AttentionCheck.REPLAY, AttentionCheck.TRANSFER
    pair.step(replay, BatchEntry(1, 0, tokens(c, "a", long), "last"), BatchEntry(2, 0, tokens(c, "b", 3), "all"))
    pair.step(transfer, BatchEntry(2, 3, tokens(c, "c", 2), "none"), BatchEntry(3, 0, tokens(c, "d", 1), "last"))
    pair.step(transfer, BatchEntry(1, long, tokens(c, "e", 40), "last"), BatchEntry(3, 1, (7,), "last"))
    pair.step(replay, BatchEntry(3, 2, (9,), "last"), BatchEntry(1, long + 40, tokens(c, "f", 1), "none"))
    for position in range(41, 44):
        pair.step(replay, BatchEntry(1, long + position, (5,), "last"), BatchEntry(2, position - 36, (6,), "last"))
    pair.free(2)
    pair.step(replay, BatchEntry(1, long + 44, (8,), "last"), BatchEntry(2, 0, tokens(c, "g", 5), "last"))
    assert pair.cuda.nonzero_bytes() > 0
    pair.free(1, 2, 3)
    assert pair.cuda.nonzero_bytes() == 0


def check_ahead(pair: Pair, chunk: int, chunks: int) -> None:
    """A prompt whose chunks are all known, then tokens: more layers than there are slots are on their way between them."""
    c = pair.config
    ids = tokens(c, "ahead", chunk * chunks)
    for check in AttentionCheck:
        steps = [[BatchEntry(1, at, ids[at : at + chunk], "none")] for at in range(0, len(ids), chunk)]
        steps += [[BatchEntry(1, len(ids) + i, (3 + i,), "last")] for i in range(3)]
        pair.steps(check, steps)
        pair.free(1)
    assert pair.cuda.nonzero_bytes() == 0


def check_straight(pair: Pair, rows: int, staged_bytes: int = 0) -> None:
    """Claims that the device writes into shared memory have the same bytes in the same order; an answer that has to come
    back, and a step without a sink in between, do not meet what is on its way."""
    c, expected, sink = pair.config, Collected(), Shared()
    entry = BatchEntry(1, 0, tokens(c, "straight", rows), "last")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "STAGED_BYTES", staged_bytes)
        pair.cpu.step(Batch((entry,)), AttentionCheck.TRANSFER, expected)
        pair.cuda.step(Batch((entry,)), AttentionCheck.TRANSFER, sink)
        got = pair.cuda.step(Batch((BatchEntry(2, 0, (5, 6)),)), AttentionCheck.REPLAY, None)
        pair.cuda.finish()
        assert got.tobytes() == pair.cpu.step(Batch((BatchEntry(2, 0, (5, 6)),)), AttentionCheck.REPLAY, None).tobytes()
        assert sink.straight > 0
        assert [claim[3] for claim in sink.claims] == [claim[3] for claim in expected.claims]
        pair.free(1, 2)
    assert pair.cuda.nonzero_bytes() == 0


def check_greedy(pair: Pair, prompt: int, count: int) -> list[int]:
    """Token ids of a greedy answer without claims (`dangerous-unverified`): the same from both."""
    ids: list[list[int]] = []
    for backend in (pair.cpu, pair.cuda):
        found, new, at = [], tokens(pair.config, "prompt", prompt), 0
        for _ in range(count):
            logits = backend.step(Batch((BatchEntry(5, at, new, "last"),)), AttentionCheck.REPLAY, None)
            at += len(new)
            new = (int(np.argmax(logits[0])),)
            found += new
        ids.append(found)
    pair.free(5)
    assert ids[0] == ids[1]
    return ids[1]


def check_operations(pair: Pair) -> None:
    """Linears, attention in head blocks and row tiles with every reply, given weights, replaced matrices."""
    c, bits = pair.config, Bits("operations")
    for index, (_, width) in enumerate(c.linear_shapes().values()):
        pair.ask("linear", LinearRequest(index, bits.integers(-127, 127, 1 + 20 * (index % 2), width).astype(np.int8)))
    group, d = c.num_heads // c.num_kv_heads, c.head_dim
    lengths = {4: 0, 6: 0}
    for number, (counts, tile) in enumerate([((70, 3), 64), ((5, 1), 2), ((1, 1), 1)]):
        runs = tuple(Run(s, lengths[s], n) for s, n in zip(lengths, counts, strict=True))
        for s, n in zip(lengths, counts, strict=True):
            lengths[s] += n
        for layer in range(c.num_layers):
            for kv in range(c.num_kv_heads):
                total, small = sum(counts), (0.01, 0.3)
                pair.ask("attend", AttendRequest(
                    layer, kv, 1, Reply((number + kv) % 3), tile, runs,
                    bits.integers(-127, 127, total, group, d).astype(np.int8), bits.uniform(*small, total, group),
                    bits.integers(-127, 127, total, 1, d).astype(np.int8), bits.uniform(0.001, 0.02, total, 1),
                    bits.integers(-127, 127, total, 1, d).astype(np.int8),
                ))  # fmt: skip
    p = bits.integers(0, 16336, c.num_heads, 2, lengths[4]).astype(np.uint16)
    pair.ask("weights", WeightsRequest(1, 4, p))
    out, width = c.linear_shapes()["layers.1.qkv"]
    index = list(c.linear_shapes()).index("layers.1.qkv")
    rows = bits.integers(-127, 127, out, width).astype(np.int8)
    for backend in (pair.cpu, pair.cuda):
        backend.load_rows(LoadRequest(index, 0, rows[:10]))
        backend.load_rows(LoadRequest(index, 10, rows[10:]))
    pair.ask("linear", LinearRequest(index, bits.integers(-127, 127, 2, width).astype(np.int8)))
    pair.free(4, 6)
    assert pair.cuda.nonzero_bytes() == 0


MODELS: dict[str, dict[str, Any]] = {
    "odd": {},
    "everything": {"qkv_bias": True, "qk_norm": True, "k_center": True, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
}  # fmt: skip


def models() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from MODELS.items()
