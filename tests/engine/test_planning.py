"""The step after the one at hand is planned where no sample decides it: cancelled requests, faults, arrivals in between."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import Executor
from veriattn.spec.forward import Batch
from veriattn.spec.reference import F32

CHUNK = 16


def request(seed: int, length: int, max_tokens: int = 3) -> Request:
    prompt = np.random.default_rng(seed).integers(0, 256, length)
    return Request(tuple(int(t) for t in prompt), max_tokens=max_tokens, ignore_eos=True)


class Noted:
    """An executor that notes what it is asked for."""

    def __init__(self, inner: Executor, log: list[tuple[Any, ...]]) -> None:
        self._inner, self._log = inner, log
        self.report, self.close = inner.report, inner.close

    def run(self, batch: Batch, following: Batch | None = None) -> F32:
        runs = [
            None if b is None else [(e.seq_id, e.start, e.num_tokens) for e in b.entries] for b in (batch, following)
        ]
        self._log.append(("run", *runs))
        return self._inner.run(batch, following)

    def free(self, seq_id: int) -> None:
        self._log.append(("free", seq_id))
        self._inner.free(seq_id)


def started(path: Path, strategy: Any = "run-ahead", **settings: Any) -> tuple[Engine, list[tuple[Any, ...]]]:
    engine, log = Engine(path, EngineConfig(strategy=strategy, prefill_chunk=CHUNK, **settings)), []
    engine.start()
    assert engine.executor is not None
    engine._executor = Noted(engine.executor, log)
    return engine, log


def test_chunks_are_planned_and_samples_are_waited_for(tiny_model: Path) -> None:
    engine, log = started(tiny_model)
    with engine:
        engine.generate([request(1, 40, max_tokens=2)])
    assert log == [
        ("run", [(0, 0, 16)], [(0, 16, 16)]),
        ("run", [(0, 16, 16)], [(0, 32, 8)]),
        ("run", [(0, 32, 8)], None),
        ("run", [(0, 40, 1)], None),
        ("free", 0),
    ]


def test_a_chunk_beside_decoding_plans_nothing(tiny_model: Path) -> None:
    """The next step has the sequence that waits for its sample in it."""
    engine, log = started(tiny_model)
    with engine:
        first = engine.submit(request(1, 4, max_tokens=4))
        engine.step()
        engine.submit(request(2, 40, max_tokens=1))
        while engine.states[first].finish_reason is None:
            engine.step()
        engine.run_all()
    following = {tuple(map(tuple, entry[1])): entry[2] for entry in log if entry[0] == "run"}
    assert all(f is None for runs, f in following.items() if any(seq == 0 for seq, *_ in runs))


@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn", "full-tee", "dangerous-unverified"])
def test_cancelled_between_a_step_and_the_planned_one(tiny_model: Path, strategy: Any) -> None:
    """The planned step runs as it was planned; then the sequence is freed, and the others' tokens are what they would be."""
    with Engine(tiny_model, EngineConfig(strategy="full-tee")) as engine:
        expected = [engine.generate([r])[0].output_ids for r in (request(2, 30), request(3, 5))]
    engine, log = started(tiny_model, strategy)
    with engine:
        cancelled, other = engine.submit(request(1, 60)), engine.submit(request(2, 30))
        assert engine.step() == []
        engine.forget(cancelled)
        late = engine.submit(request(3, 5))
        assert engine.has_work
        engine.run_all()
        assert [engine.states[i].output_ids for i in (other, late)] == expected
    assert log[:3] == [
        ("run", [(0, 0, 16)], [(0, 16, 16)]),
        ("run", [(0, 16, 16)], None),
        ("free", 0),
    ]
    assert sorted(entry[1] for entry in log if entry[0] == "free") == [0, 1, 2]


def test_a_planned_step_of_nobody_is_run_and_freed(tiny_model: Path) -> None:
    """Otherwise a cancelled prompt would stay on both sides until somebody else comes."""
    engine, log = started(tiny_model)
    with engine:
        only = engine.submit(request(1, 60))
        engine.step()
        engine.forget(only)
        assert engine.has_work
        assert engine.step() == []
        assert not engine.has_work and log[-1] == ("free", 0)
        assert engine.load() == (0, 0, 0)


def test_a_cancelled_last_chunk_releases_nothing(tiny_model: Path) -> None:
    engine, _ = started(tiny_model)
    with engine:
        only = engine.submit(request(1, 20))
        engine.step()  # the planned step asks for logits
        engine.cancel(only)
        assert engine.step() == [] and engine.states[only].output_ids == []


def test_a_prover_killed_with_a_step_ahead(tiny_model: Path) -> None:
    """Both steps are computed again on the next one."""
    with Engine(tiny_model, EngineConfig(strategy="full-tee")) as engine:
        expected = engine.generate([request(1, 60)])[0].output_ids
    engine, _ = started(tiny_model)
    with engine:
        wanted = engine.submit(request(1, 60))
        engine.step()
        pid = engine.report().prover_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        engine.run_all()
        assert engine.states[wanted].output_ids == expected and engine.restarts == 1


def test_reset_with_a_step_ahead(tiny_model: Path) -> None:
    engine, _ = started(tiny_model)
    with Engine(tiny_model, EngineConfig(strategy="full-tee")) as other:
        expected = other.generate([request(1, 60)])[0].output_ids
    with engine:
        wanted, gone = engine.submit(request(1, 60)), engine.submit(request(2, 9))
        engine.step()
        engine.cancel(gone)
        engine.reset()
        engine.run_all()
        assert engine.states[wanted].output_ids == expected
