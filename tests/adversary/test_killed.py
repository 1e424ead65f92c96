"""The prover is killed at any moment: a clean error or the same tokens, nothing unverified shown, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import Strategy
from veriattn.errors import ProverFault, ProverUnavailable, VerificationError
from veriattn.spec.sampler import SamplingParams
from veriattn.verifier.launch import ChildProver, Prover
from veriattn.verifier.model import VerifierModel

REQUESTS = (
    Request((5, 9, 2, 77, 30, 4, 41), max_tokens=10, ignore_eos=True),
    Request((8, 8, 100), SamplingParams(temperature=0.8, seed=3), max_tokens=10, ignore_eos=True),
)
MOMENTS = 8


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> list[list[int]]:
    with Engine(tiny_model, EngineConfig(strategy="full-tee")) as engine:
        return [state.output_ids for state in engine.generate(REQUESTS)]


class KilledLaunch:
    """Starts provers; the first one is killed so many seconds after its start."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.pids: list[int] = []

    def __call__(self, model: VerifierModel) -> Prover:
        prover = ChildProver(model, timeout_s=30.0)
        assert prover.pid is not None
        if not self.pids:
            self._killer = threading.Thread(target=self._kill, args=(os.pidfd_open(prover.pid),))
            self._killer.start()
        self.pids.append(prover.pid)
        return prover

    def _kill(self, pidfd: int) -> None:
        time.sleep(self.delay_s)
        with contextlib.suppress(ProcessLookupError):  # the work may be done by then
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)

    def join(self) -> None:
        self._killer.join()


def children() -> dict[int, str]:
    """This process's children that are provers, by pid, and their command lines."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and b"veriattn.prover" in command:
            found[int(stat.parent.name)] = command.decode()
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    def segments() -> int:
        return Path("/proc/self/maps").read_text().count("veriattn-ring")

    others, before, shared = children(), segments(), sorted(os.listdir("/dev/shm"))
    yield
    assert {pid: command for pid, command in children().items() if pid not in others} == {}
    assert segments() == before
    assert sorted(os.listdir("/dev/shm")) == shared


def run(engine: Engine, expected: list[list[int]]) -> list[list[int]]:
    """Tokens as they are released; each is compared at once."""
    ids = [engine.submit(request) for request in REQUESTS]
    got: dict[int, list[int]] = {i: [] for i in ids}
    right = dict(zip(ids, expected, strict=True))
    while engine.has_work:
        for out in engine.step():
            if out.token_id is not None:
                got[out.request_id].append(out.token_id)
            assert got[out.request_id] == right[out.request_id][: len(got[out.request_id])]
    return list(got.values())


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("strategy", ["run-ahead", "veriattn"])
@pytest.mark.parametrize("moment", range(MOMENTS // 2))
def test_killed_at_random_and_replaced(
    strategy: Strategy, moment: int, tiny_model: Path, expected: list[list[int]]
) -> None:
    launch = KilledLaunch(random.Random(moment).uniform(0.0, 0.5))
    with Engine(tiny_model, EngineConfig(strategy=strategy, retries=1), launch=launch) as engine:
        assert run(engine, expected) == expected
        assert engine.restarts == len(launch.pids) - 1
    launch.join()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("moment", range(MOMENTS // 2))
def test_killed_at_random_without_a_retry(moment: int, tiny_model: Path, expected: list[list[int]]) -> None:
    launch = KilledLaunch(random.Random(100 + moment).uniform(0.0, 0.5))
    with Engine(tiny_model, EngineConfig(retries=0), launch=launch) as engine:
        with contextlib.suppress(ProverUnavailable):  # what came before was compared as it was released
            assert run(engine, expected) == expected
        assert len(launch.pids) == 1
    launch.join()


def liar(**attack: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "veriattn.redteam.liar", json.dumps(attack))


PHASES = [
    ("START", 0), ("HELLO", 0), ("READY", 0), ("layers.0.qkv", 0), ("layers.1.attention", 0), ("lm_head", 0),
    ("layers.0.qkv", 3), ("layers.0.gate_up", 3), ("lm_head", 3),
]  # fmt: skip


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("claim", "step"), PHASES)
@pytest.mark.parametrize("kind", ["die", "half_die"])
def test_killed_at_every_phase(kind: str, claim: str, step: int, tiny_model: Path, expected: list[list[int]]) -> None:
    """The first prover dies there, by its own hand; its successor is honest: the same tokens."""
    if kind == "half_die" and claim in ("START", "HELLO"):
        kind = "hangup" if claim == "HELLO" else "die"
    commands = [liar(kind=kind, claim=claim, step=step), liar()]
    used: list[Prover] = []

    def launch(model: VerifierModel) -> Prover:
        used.append(ChildProver(model, commands[min(len(used), 1)], timeout_s=30.0))
        return used[-1]

    with Engine(tiny_model, EngineConfig(retries=1), launch=launch) as engine:
        assert run(engine, expected) == expected
    assert (len(used), engine.restarts) == (2, 1)


@pytest.mark.usefixtures("nothing_left")
def test_a_lie_is_not_retried_and_shows_nothing_of_its_step(tiny_model: Path, expected: list[list[int]]) -> None:
    command = liar(kind="fault", fault="bump_to_top", claim="lm_head", step=4, value=7)
    with Engine(tiny_model, EngineConfig(prover_command=command, retries=5)) as engine:
        ids = [engine.submit(request) for request in REQUESTS]
        with pytest.raises(VerificationError) as caught:
            engine.run_all()
        assert caught.value.code == "freivalds_mismatch"
        assert engine.restarts == 0
        released = [engine.states[i].output_ids for i in ids]
    assert released == [right[:4] for right in expected]


@pytest.mark.usefixtures("nothing_left")
def test_requests_go_on_after_a_lie(tiny_model: Path, expected: list[list[int]]) -> None:
    """The caller may go on with a fresh prover; it recomputes from the tokens that were released."""
    commands = [liar(kind="fault", fault="bit", claim="layers.0.o", step=5), liar()]
    used: list[Prover] = []

    def launch(model: VerifierModel) -> Prover:
        used.append(ChildProver(model, commands[min(len(used), 1)], timeout_s=30.0))
        return used[-1]

    with Engine(tiny_model, EngineConfig(), launch=launch) as engine:
        ids = [engine.submit(request) for request in REQUESTS]
        with pytest.raises(VerificationError):
            engine.run_all()
        engine.run_all()
        assert [engine.states[i].output_ids for i in ids] == expected
    assert len(used) == 2


@pytest.mark.usefixtures("nothing_left")
def test_silence_ends_in_time(tiny_model: Path) -> None:
    config = EngineConfig(
        prover_command=liar(kind="silence", claim="layers.0.o", step=2), retries=0, step_timeout_s=1.0
    )
    with Engine(tiny_model, config) as engine:
        started = time.monotonic()
        engine.submit(REQUESTS[0])
        with pytest.raises(ProverFault) as caught:
            engine.run_all()
        assert caught.value.code == "prover_timeout"
        assert caught.value.exit_code == 4
        assert time.monotonic() - started < 60
