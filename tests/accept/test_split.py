"""Acceptance of decoding beyond the prover's memory: every capacity and ratio on SmolLM2, memory of the real process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import ExecutorReport, Strategy
from veriattn.spec.kv import PAGE

pytestmark = pytest.mark.accept

STRATEGIES: tuple[Strategy, ...] = ("run-ahead", "veriattn", "tsdp")
SENTENCE = "The river that comes down from the hills in spring is brown and fast, and nobody crosses it before May. "


def prompts(engine: Engine, lengths: tuple[int, ...]) -> list[Request]:
    """Prompts of so many tokens, all different."""
    requests = []
    for i, n in enumerate(lengths):
        ids = tuple(engine.codec.encode(f"Letter {i}. " + SENTENCE * (n // 15)))[:n]
        assert len(ids) == n
        requests.append(Request(ids, max_tokens=12, ignore_eos=True))
    return requests


def lengths(capacity: int | None, batch: int) -> tuple[int, ...]:
    """The first prompt is so much longer than the capacity that 0.3 of what lies beyond is a block."""
    return (2900 if capacity == 2000 else 960, *((70, 300, 20, 540) if batch == 5 else ()))


def answers(
    model: Path, strategy: Strategy, sizes: tuple[int, ...], capacity: int | None, ratio: float | None
) -> tuple[list[list[int]], ExecutorReport]:
    config = EngineConfig(strategy=strategy, prover_kv_tokens=capacity, offload_ratio=ratio)
    with Engine(model, config) as engine:
        states = engine.generate(prompts(engine, sizes))
        return [s.output_ids for s in states], engine.report()


@cache
def truth(model: Path, sizes: tuple[int, ...]) -> list[list[int]]:
    return answers(model, "full-tee", sizes, None, None)[0]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("capacity", [0, 64, 2000, None])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_tokens(
    smollm2: Path, strategy: Strategy, capacity: int | None, ratio: float | None, batch: int
) -> None:
    sizes = lengths(capacity, batch)
    got, report = answers(smollm2, strategy, sizes, capacity, ratio)
    assert got == truth(smollm2, sizes)
    where = report.kv_prover_tokens, report.kv_streamed_tokens, report.kv_tee_tokens
    print(f"\n{strategy}, C = {capacity}, p = {ratio}, batch {batch}: resident, streamed, in the TEE {where}")
    if capacity is None:
        assert where == (0, 0, 0)
    elif strategy == "tsdp":
        assert (where[0] > 0) == (capacity > 0) and where[1] > 0 and where[2] == 0
    else:
        assert (where[0] > 0) == (capacity > 0) and where[2] > 0
        assert (where[1] > 0) == (ratio != 0) and where[1] % PAGE == 0


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) << 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_of_the_prover(smollm2: Path, strategy: Strategy) -> None:
    """Decoding from 300 tokens to 1,900, capacity 256: the process gains less than a quarter of what the cache would."""
    config = EngineConfig(strategy=strategy, prover_kv_tokens=256, offload_ratio=0.5)
    with Engine(smollm2, config) as engine:
        request = Request(prompts(engine, (300,))[0].prompt_ids, max_tokens=1600, ignore_eos=True)
        measured = []
        for i, _ in enumerate(engine.stream(engine.submit(request))):
            pid = engine.report().prover_pid
            assert pid is not None
            if i >= 32 and i % 32 == 0:
                measured.append(resident_bytes(pid))
        c = engine.model.manifest.config
    cache_bytes = 1568 * c.num_layers * c.num_kv_heads * (2 * c.head_dim + 4)
    gained = max(measured) - measured[0]
    print(f"\n{strategy}: the prover gained {gained >> 10} KiB, the cache would have gained {cache_bytes >> 10} KiB")
    assert gained < cache_bytes // 4
