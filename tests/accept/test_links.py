"""Acceptance of strategies and links on SmolLM2: order and bytes, overlap, TCP, a thousand requests. `make accept`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks.links import order, overlap, table_of_order, table_of_overlap

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import STRATEGIES, Strategy
from veriattn.native import get_threads, set_threads
from veriattn.spec.sampler import SamplingParams
from veriattn.verifier.model import VerifierModel

pytestmark = pytest.mark.accept

PROMPTS = ("Why is the sky blue?", "Write a function that adds two numbers.", "Name three rivers of Europe.")
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=5)


@pytest.fixture
def one_thread() -> object:
    """Verifier and prover have a core each."""
    before = get_threads()
    set_threads(1)
    yield
    set_threads(before)


def test_order(smollm2: Path, one_thread: None) -> None:
    rows = order(VerifierModel(smollm2))
    print("\n" + table_of_order(rows, 0.5, 1024))
    assert all(r.measured == r.paper for r in rows)
    run_ahead, veriattn, tsdp = (r.seconds for r in rows)
    assert run_ahead < veriattn < tsdp


def test_overlap(smollm2: Path, one_thread: None) -> None:
    o = overlap(VerifierModel(smollm2), repetitions=5)
    print("\n" + table_of_overlap(o))
    assert o.ratio <= 0.65


def test_tcp_and_memfd_agree(
    smollm2: Path, start_listening: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    answers = set()
    with start_listening(smollm2) as address:
        for strategy in STRATEGIES:
            for link in (None, address)[: 1 if strategy == "full-tee" else 2]:
                with Engine(smollm2, EngineConfig(strategy=strategy, prover_address=link)) as engine:
                    chats = [tuple(engine.codec.encode_chat([{"role": "user", "content": p}])) for p in PROMPTS]
                    requests = [
                        Request(c, params, max_tokens=24) for c in chats for params in (SamplingParams(), SAMPLED)
                    ]
                    answers.add(tuple(tuple(s.output_ids) for s in engine.generate(requests)))
    assert len(answers) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_over_a_thousand_requests(strategy: Strategy, tiny_model: Path) -> None:
    """Private memory of both processes after 1,000 requests is that after 100."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, (5, 4)).tolist()
    with Engine(tiny_model, EngineConfig(strategy=strategy)) as engine:
        seen = []
        for i in range(275):
            batch = [tuple(int(t) for t in rng.integers(4, 256, n)) for n in lengths[i % 5]]
            engine.generate([Request(p, max_tokens=2, ignore_eos=True) for p in batch])
            if i in (24, 274):
                pid = engine.report().prover_pid
                seen.append([_private_kb(str(p)) for p in ("self", pid) if p is not None])
    print(f"\nmemory, {strategy}: {seen[0]} KiB after 100 requests, {seen[1]} KiB after 1,100")
    assert all(after <= before + 2048 for before, after in zip(*seen, strict=True))


def _private_kb(pid: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])
