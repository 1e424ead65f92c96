"""Runners over real sessions: bytes as on paper, tokens as without a limit, times and counters that make sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from veriattn.bench import measure
from veriattn.bench.runner import Models, Setup, StrategyRunner, compiled_kernels
from veriattn.bench.shapes import shape, write_random_model
from veriattn.bench.traffic import Bytes
from veriattn.engine.strategies import STRATEGIES, Strategy
from veriattn.errors import InternalError, UsageError
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.spec.modelfile import ModelDirectory
from veriattn.wire.messages import AttentionCheck

TINY = shape("tiny")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    write_random_model(directory, TINY)
    return directory


@pytest.fixture(scope="module")
def models(path: Path) -> Iterator[Models]:
    yield Models(path)


def test_a_shape_has_one_digest(path: Path, tmp_path: Path) -> None:
    first = ModelDirectory(path)
    assert first.config == TINY
    assert write_random_model(tmp_path / "again", TINY) == first.manifest.digest
    assert write_random_model(tmp_path / "other", shape("tiny", 1)) != first.manifest.digest


@pytest.mark.parametrize("layers", [0, 3])
def test_no_more_layers_than_there_are(layers: int) -> None:
    with pytest.raises(UsageError):
        shape("tiny", layers)
    with pytest.raises(UsageError):
        shape("llama-9b")


LIMITED = [
    ("run-ahead", 0, 0.5), ("run-ahead", 100, None), ("veriattn", 0, 1.0), ("veriattn", 100, 0.4), ("tsdp", 0, None),
    ("tsdp", 100, None),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "limit", "ratio"), [*((s, None, None) for s in STRATEGIES), *LIMITED])
def test_bytes_are_those_on_paper(strategy: Strategy, limit: int | None, ratio: float | None, models: Models) -> None:
    setup = Setup(prefill_chunk=96, batch=2, prover_kv_tokens=limit, offload_ratio=ratio, prover_threads=1)
    runner = StrategyRunner(strategy, models, setup)
    try:
        prompt = measure.prefill(runner, 150, 2, 96, TINY.vocab_size, 1)
        decoding = measure.Decoding(runner, 2, TINY.vocab_size)
        token = measure.decode(decoding, 700, 2)
    finally:
        runner.close()
    for sample in (prompt, token):
        assert sample.moved == sample.paper
        assert (sample.moved == Bytes(0, 0)) == (strategy == "full-tee")
        assert sample.total_s > 0 and sample.tee_cpu_s > 0
        assert (sample.shares is None) == (strategy == "full-tee")
        assert (sample.prover_peak_bytes is None) == (strategy == "full-tee")
    if strategy == "dangerous-unverified":
        assert prompt.attention_s is None
    assert (token.attention_s is None) == (strategy == "dangerous-unverified")
    # One step to warm up, two that count, two with the trace; three more where whole layers are one call.
    assert decoding.length in (705, 708)
    assert (token.ratio is not None) == (limit is not None and strategy != "tsdp")


def test_where_kernels_are_compiled_the_warm_up_is_what_is_timed(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for gpu, steps in ((False, [96, 96, 54, 96, 54]), (True, [96, 54, 96, 54, 96, 54])):
        runner = StrategyRunner(
            "run-ahead", models, Setup(prefill_chunk=96, prover_threads=1, gpu=gpu, kernels=tmp_path if gpu else None)
        )
        seen: list[int] = []
        run = runner.step
        monkeypatch.setattr(
            runner,
            "step",
            lambda batch, *rest, run=run, seen=seen: (seen.append(batch.num_tokens), run(batch, *rest))[1],
        )
        try:
            measure.prefill(runner, 150, 1, 96, TINY.vocab_size, 1)
            assert seen == steps, "a step or a prompt to warm up, one that counts, one with the trace"
            decoding = measure.Decoding(runner, 1, TINY.vocab_size)
            measure.decode(decoding, 20, 2)
            # Before those that count, one step or four; then two with the trace, three with attention apart.
            assert decoding.length - 20 in ((1 + 2 + 2, 1 + 2 + 2 + 3), (4 + 2 + 2, 4 + 2 + 2 + 3))[gpu]
            process = runner.session.prover.pid if runner.session is not None else None
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            assert (f"TRITON_CACHE_DIR={tmp_path}".encode() in environment) == gpu
        finally:
            runner.close()


def test_provers_of_any_user_may_keep_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with compiled_kernels() as place:
        assert place.stat().st_mode & 0o7777 == 0o1777
    assert not place.exists()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiled_kernels() as place:
        assert place == tmp_path
    assert tmp_path.exists()


def test_full_tee_compiles_nothing_and_has_no_trace(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = StrategyRunner("full-tee", models, Setup(gpu=True))
    seen: list[int] = []
    run = runner.step
    monkeypatch.setattr(runner, "step", lambda batch, *rest: (seen.append(batch.num_tokens), run(batch, *rest))[1])
    try:
        assert measure.prefill(runner, 40, 1, 96, TINY.vocab_size, 2).shares is None
    finally:
        runner.close()
    assert seen == [40, 40, 40]


def test_transferred_scores_count(models: Models) -> None:
    setup = Setup(prefill_chunk=96, attention_check=AttentionCheck.TRANSFER, prover_threads=1)
    runner = StrategyRunner("veriattn", models, setup)
    try:
        sample = measure.prefill(runner, 150, 1, 96, TINY.vocab_size, 1)
    finally:
        runner.close()
    assert sample.moved == sample.paper


def test_a_sweep_takes_turns(models: Models) -> None:
    runner = StrategyRunner("veriattn", models, Setup(batch=2, prover_kv_tokens=0, prover_threads=1))
    try:
        decoding = measure.Decoding(runner, 2, TINY.vocab_size)
        samples = measure.sweep(runner, decoding, 600, (0.0, 0.5, 1.0, None), 2)
    finally:
        runner.close()
    assert list(samples) == [0.0, 0.5, 1.0, None]
    for ratio, sample in samples.items():
        assert sample.moved == sample.paper and sample.repetitions == 2
        if ratio is not None:
            assert sample.ratio == ratio
    # Streaming nothing moves no keys; streaming all of them moves two blocks of every layer.
    moved = samples[1.0].moved.to_prover - samples[0.0].moved.to_prover
    assert moved > 2 * TINY.num_layers * 2 * 256 * TINY.num_kv_heads * 2 * TINY.head_dim
    assert 0.0 <= (samples[None].ratio or 0.0) <= 1.0


def test_a_sweep_needs_a_limited_prover(models: Models) -> None:
    runner = StrategyRunner("veriattn", models, Setup(prover_threads=1))
    try:
        with pytest.raises(UsageError):
            measure.sweep(runner, measure.Decoding(runner, 1, TINY.vocab_size), 64, (0.0,), 1)
    finally:
        runner.close()


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn"])
def test_logits_over_assumed_keys_do_not_depend_on_where_they_are(strategy: Strategy, models: Models) -> None:
    """The prover's capacity and the offload ratio change nothing about the result of a step over made-up keys."""

    def logits(limit: int, ratio: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        setup = Setup(prover_kv_tokens=limit, offload_ratio=ratio, prover_threads=1)
        runner = StrategyRunner(strategy, models, setup)
        try:
            runner.fill(0, 600)
            assert runner.session is not None
            return runner.session.run(Batch((BatchEntry(0, 600, (7,)),)))
        finally:
            runner.close()

    first = logits(0, 0.0)
    assert np.array_equal(first, logits(0, 1.0))
    # With a capacity the first keys come from running the model: another sequence, so other logits.
    assert not np.array_equal(first, logits(64, 0.0))


def test_keys_cannot_be_assumed_where_the_prover_keeps_them(models: Models) -> None:
    runner = StrategyRunner("veriattn", models, Setup(prover_kv_tokens=100, prover_threads=1))
    try:
        assert runner.session is not None
        with pytest.raises(InternalError, match="the prover keeps these positions"):
            runner.session.assume(0, [_keys(8)] * TINY.num_layers)
        with pytest.raises(InternalError, match="for every layer"):
            runner.session.assume(0, [_keys(8)])
    finally:
        runner.close()


def _keys(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    k = np.ones((tokens, TINY.num_kv_heads, TINY.head_dim), np.int8)
    return k, np.ones(k.shape[:2], np.float32), k


def test_prompts_share_steps_first_come_first_served() -> None:
    steps = measure.prompt_steps(100, 3, 128, 1000)
    assert [[(e.seq_id, e.start, e.num_tokens, e.logits) for e in s.entries] for s in steps] == [
        [(0, 0, 100, "last"), (1, 0, 28, "none")],
        [(1, 28, 72, "last"), (2, 0, 56, "none")],
        [(2, 56, 44, "last")],
    ]
    assert sum(s.num_tokens for s in measure.prompt_steps(64, 2, 128, 1000)) == 128


def test_lengths_only_grow(models: Models) -> None:
    runner = StrategyRunner("full-tee", models, Setup())
    try:
        decoding = measure.Decoding(runner, 1, TINY.vocab_size)
        decoding.fill(50)
        with pytest.raises(UsageError):
            decoding.fill(49)
        decoding.free()
        decoding.fill(10)
        assert decoding.length == 10
    finally:
        runner.close()
