"""Tiny canonical models, written once per test run, and a prover that listens."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import helpers

import veriattn

#: Odd on purpose: head_dim is not hidden / heads, three query heads per KV head, a vocabulary that is no round number.
TINY: dict[str, object] = {
    "hidden_size": 40,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
    "vocab_size": 307,
    "max_positions": 2048,
    "rotary_dim": 8,
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model directory for `TINY` with some sizes changed; the same arguments give the same directory."""
    made: dict[str, Path] = {}

    def make(seed: int = 0, **changes: object) -> Path:
        key = repr((seed, sorted(changes.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("models")
            directory.parent.parent.chmod(0o755)  # a prover with its own user must be able to read it
            directory.parent.chmod(0o755)
            directory.chmod(0o755)
            helpers.make_model(directory / "model", seed=seed, **{**TINY, **changes})  # type: ignore[arg-type]
            made[key] = directory / "model"
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """A model directory for `TINY`."""
    return make_model()


@pytest.fixture(scope="session")
def listening_prover(tiny_model: Path) -> Iterator[str]:
    """Address of a prover that listens on TCP and has the tiny model, for several sessions at a time."""
    with listening(tiny_model, sessions=8) as address:
        yield address


@pytest.fixture(scope="session")
def start_listening() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`listening`: a prover at an address of one's own, as a context."""
    return listening


@contextlib.contextmanager
def listening(model_dir: Path, address: str = "tcp://127.0.0.1:0", sessions: int = 1) -> Iterator[str]:
    """`python -m veriattn.prover --listen`, up and running."""
    command = [sys.executable, "-m", "veriattn.prover", "--listen", address, "--sessions", str(sessions)]
    command += ["--model-dir", str(model_dir)]
    environment = {**os.environ, "VERIATTN_THREADS": "1", "PYTHONPATH": str(Path(veriattn.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line.startswith("listening at "), line
            yield line.split()[-1]
        finally:
            process.terminate()
            assert process.wait(15) == 0
