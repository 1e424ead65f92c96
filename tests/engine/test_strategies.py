"""All five placements of the forward pass return the same tokens: over links, batches, chunks and ways of sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.helpers import ARCHITECTURES, make_model

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import STRATEGIES, Strategy
from veriattn.spec.sampler import SamplingParams
from veriattn.verifier import tiling
from veriattn.verifier.tiling import Tiling
from veriattn.wire.emulate import Throttle
from veriattn.wire.messages import AttentionCheck

GREEDY = SamplingParams()
SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=11)
LENGTHS = (5, 90, 1, 600)  # from one token to more than two pages


def requests(max_tokens: int = 6) -> list[Request]:
    rng = np.random.default_rng(3)
    prompts = [tuple(int(t) for t in rng.integers(0, 256, n)) for n in LENGTHS]
    return [Request(p, params, max_tokens, ignore_eos=True) for params in (GREEDY, SEEDED) for p in prompts]


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[list[int]]:
    """Each request alone, in the TEE."""
    with Engine(tiny_model, EngineConfig(strategy="full-tee")) as engine:
        ids = [engine.generate([r])[0].output_ids for r in requests()]
    assert len({tuple(i) for i in ids}) == len(ids)  # the comparison below can fail
    return ids


def config(strategy: Strategy, address: str | None, **settings: object) -> EngineConfig:
    threads = None if address or strategy == "full-tee" else 1
    return EngineConfig(strategy=strategy, prover_address=address, prover_threads=threads, **settings)  # type: ignore[arg-type]


CASES = [(s, link) for s in STRATEGIES for link in ("memfd", "tcp") if (s, link) != ("full-tee", "tcp")]


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize(("strategy", "link"), CASES)
def test_same_tokens(
    strategy: Strategy, link: str, chunk: int, tiny_model: Path, listening_prover: str, expected: list[list[int]]
) -> None:
    address = listening_prover if link == "tcp" else None
    with Engine(tiny_model, config(strategy, address, prefill_chunk=chunk)) as engine:
        batched = [s.output_ids for half in (requests()[:4], requests()[4:]) for s in engine.generate(half)]
        alone = [engine.generate([r])[0].output_ids for r in requests()[::3]]
        report = engine.report()
    assert batched == expected
    assert alone == expected[::3]
    assert engine.restarts == 0
    # What was checked must not depend on the placement.
    if strategy in ("run-ahead", "veriattn", "tsdp"):
        tokens = sum(LENGTHS) * 2 + 8 * 5 + sum(len(r.prompt_ids) + 5 for r in requests()[::3])
        assert report.attention_rows == tokens * 6 * 2
        assert report.linear_rows >= tokens * 8
    else:
        assert report.attention_rows == report.linear_rows == 0


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn"])
def test_same_tokens_by_transfer(strategy: Strategy, tiny_model: Path, expected: list[list[int]]) -> None:
    settings = config(strategy, None, prefill_chunk=100, attention_check=AttentionCheck.TRANSFER)
    with Engine(tiny_model, settings) as engine:
        assert [s.output_ids for s in engine.generate(requests())] == expected


@pytest.mark.parametrize("cut", [Tiling(1, 1), Tiling(2, 5), Tiling(7, 1000), Tiling(4, 32, pipeline=False)])
@pytest.mark.parametrize("check", AttentionCheck)
def test_same_tokens_for_any_tiling(
    cut: Tiling, check: AttentionCheck, tiny_model: Path, expected: list[list[int]]
) -> None:
    with Engine(tiny_model, config("veriattn", None, tiling=cut, attention_check=check)) as engine:
        assert [s.output_ids for s in engine.generate(requests()[:4])] == expected[:4]


@pytest.mark.parametrize("limit", [1, 40_000, 200_000])
def test_same_tokens_for_any_bound_on_scores(
    limit: int, tiny_model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `tsdp` scores cross a few rows at a time: single rows, some, whole runs beside pieces of another."""
    monkeypatch.setattr(tiling, "SCORE_BYTES", limit)
    with Engine(tiny_model, config("tsdp", None)) as engine:
        assert [s.output_ids for s in engine.generate(requests()[:4])] == expected[:4]


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn", "tsdp"])
@pytest.mark.parametrize("link", ["memfd", "tcp"])
def test_same_tokens_over_an_emulated_link(
    strategy: Strategy, link: str, tiny_model: Path, listening_prover: str, expected: list[list[int]]
) -> None:
    settings = config(strategy, listening_prover if link == "tcp" else None, emulate_link=Throttle(0.5, 50))
    with Engine(tiny_model, settings) as engine:
        assert [s.output_ids for s in engine.generate(requests(2)[:4])] == [ids[:2] for ids in expected[:4]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_tokens_for_every_architecture(architecture: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", **ARCHITECTURES[architecture])
    tmp_path.chmod(0o755)
    vocab = ARCHITECTURES[architecture].get("vocab_size", 300)
    small = [
        Request(tuple(t % vocab for t in r.prompt_ids), r.params, 4, ignore_eos=True)
        for r in requests()[:3] + requests()[4:6]
    ]
    got = {}
    for strategy in STRATEGIES:
        with Engine(tmp_path / "model", config(strategy, None, prefill_chunk=33)) as engine:
            got[strategy] = [s.output_ids for s in engine.generate(small)]
    assert all(ids == got["full-tee"] for ids in got.values())
    assert len({tuple(ids) for ids in got["full-tee"]}) >= 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cancel_in_the_middle(strategy: Strategy, tiny_model: Path, expected: list[list[int]]) -> None:
    """A request that is cancelled while others prefill and decode changes nothing for them, and its memory is free again."""
    with Engine(tiny_model, config(strategy, None, prefill_chunk=64, kv_tokens=1024)) as engine:
        ids = [engine.submit(r) for r in requests()[:4]]
        engine.step()
        engine.cancel(ids[1])  # in its prefill
        for _ in range(3):
            engine.step()
        engine.cancel(ids[0])  # in its decode
        engine.run_all()
        for i in (2, 3):
            assert engine.states[ids[i]].output_ids == expected[i]
        cancelled = engine.states[ids[0]].output_ids
        assert 0 < len(cancelled) < 6
        assert cancelled == expected[0][: len(cancelled)]
        assert [engine.states[i].finish_reason for i in ids] == ["cancelled", "cancelled", "length", "length"]
        # The cache holds 1,024 tokens: a leak of either side would leave no room for these.
        again = engine.generate([requests()[3], requests()[1]])
        assert [s.output_ids for s in again] == [expected[3], expected[1]]


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn", "tsdp", "full-tee"])
def test_memory_is_flat(strategy: Strategy, tiny_model: Path) -> None:
    """After a warm-up, a hundred requests leave neither side with more memory (1,000 of them: `make accept`)."""
    with Engine(tiny_model, config(strategy, None)) as engine:
        warm = _run_many(engine, 60)
        after = _run_many(engine, 100)
    for before_kb, after_kb in zip(warm, after, strict=True):
        assert after_kb <= before_kb + 2048


def _run_many(engine: Engine, count: int) -> list[int]:
    """Private memory of both processes in KiB after so many requests of different lengths (the rings have a fixed size)."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 300, (5, 4)).tolist()  # the same shapes again and again: only a leak can add to them
    for i in range(count // 4):
        batch = [tuple(int(t) for t in rng.integers(0, 256, n)) for n in lengths[i % 5]]
        engine.generate([Request(p, max_tokens=2, ignore_eos=True) for p in batch])
    pid = engine.report().prover_pid
    return [_private_kb("self")] + ([] if pid is None else [_private_kb(str(pid))])


def _private_kb(pid: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError(f"no RssAnon of process {pid}")
