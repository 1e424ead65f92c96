"""A tiny model behind a server of its own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers import LocalModel, make_model
from tests.server.harness import Running, Start, start_server


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    make_model(path, vocab_size=260)
    return path


@pytest.fixture(scope="session")
def local(tiny_path: Path) -> LocalModel:
    return LocalModel.open(tiny_path)


@pytest.fixture
def start(tiny_path: Path, tmp_path: Path) -> Iterator[Start]:
    """Start servers of a test's own."""
    started: list[Running] = []

    def run(toml: str = "", *arguments: str, wait: bool = True, faulty: bool = True) -> Running:
        folder = tmp_path / str(len(started))
        started.append(start_server(tiny_path, folder, toml, *arguments, wait=wait, faulty=faulty))
        return started[-1]

    yield run
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for the tests of a module that do it no harm."""
    running = start_server(tiny_path, tmp_path_factory.mktemp("server"))
    yield running
    assert running.stop() == 0
