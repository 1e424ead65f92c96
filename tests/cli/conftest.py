"""The command line as a process of its own, as people meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import make_model

from veriattn.cli import main

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of standard output."""
        result: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return result


Cli = Callable[..., Outcome]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "VERIATTN_HOME": str(home)}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `veriattn ARGUMENTS` with a home of its own."""

    def run(*arguments: object, stdin: str | None = None) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "veriattn", *map(str, arguments)],
            env=environment(tmp_path / "home"),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A canonical model of two layers."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(path, eos_ids=())
    return path


@pytest.fixture
def odd_prover(tmp_path: Path) -> Callable[[str], str]:
    """`--prover-command` for the built-in prover with a few lines of another will (see odd_prover.py)."""

    def command(mode: str) -> str:
        return f"{sys.executable} {Path(__file__).with_name('odd_prover.py')} {mode}"

    return command


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`veriattn ARGUMENTS` in this process: for commands that end before they do anything."""

    def run(*arguments: object) -> Outcome:
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = main([str(a) for a in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        out = capsys.readouterr()
        return Outcome(code, out.out, out.err)

    return run
