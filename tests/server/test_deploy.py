"""What deploy/ holds, as far as it can be tried without a container or systemd."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tests.server.harness import ROOT, Start

from veriattn.server.config import ServerConfig, load_config

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> dict[str, Version]:
    """Packages of a lock file, each with at least one hash."""
    blocks = re.split(r"\n(?=\S)", (DEPLOY / name).read_text().strip())
    out = {}
    for block in blocks:
        head, *hashes = (line.strip(" \\") for line in block.splitlines())
        package, _, version = head.partition("==")
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), package
        out[canonicalize_name(package)] = Version(version)
    return out


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        (
            "requirements.lock",
            PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["server"],
        ),
        ("build-requirements.lock", PROJECT["build-system"]["requires"]),
    ],
)
def test_locks_hold_what_the_project_asks_for(lock: str, wanted: list[str]) -> None:
    packages = locked(lock)
    for text in wanted:
        requirement = Requirement(text)
        version = packages[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{lock} has {requirement.name} {version}, {text} is asked for"


def test_the_image_copies_what_is_there() -> None:
    sources = re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    shown = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in " ".join(sources).split():
        assert list(ROOT.glob(source)), source
        assert any(Path(source).match(pattern) for pattern in shown), f"{source} is ignored"


def health_check(port: int) -> int:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "")
    found = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.MULTILINE)
    assert found is not None
    command = [
        sys.executable if word == "python" else word.replace(":8000", f":{port}") for word in json.loads(found[1])
    ]
    return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode


def test_the_image_s_health_check(start: Start) -> None:
    plain, tls = start(), start("[tls]\nephemeral = true\n")
    assert health_check(plain.port) == 0
    assert health_check(tls.port) == 0
    assert plain.stop() == 0
    assert health_check(plain.port) == 1


def test_the_example_settings_are_understood() -> None:
    config = load_config(DEPLOY / "serve.toml")
    assert config.tls.ephemeral and config.keys_file and not config.demo


def test_the_settings_in_the_docs_are_all_there_are_with_their_defaults(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    (shown,) = (b for b in blocks if b.startswith("host ="))
    (tmp_path / "shown.toml").write_text(shown)
    config = load_config(tmp_path / "shown.toml")
    assert config == ServerConfig()
    names = tomllib.loads(shown)
    assert {k: set(v) if isinstance(v, dict) else None for k, v in names.items()} == {
        k: set(v) if isinstance(v, dict) else None for k, v in dataclasses.asdict(config).items()
    }


def test_the_unit_starts_a_command_that_exists() -> None:
    unit = (DEPLOY / "veriattn.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, command, *options = shlex.split(start)
    assert Path(program).name == "veriattn"
    shown = subprocess.run(
        [sys.executable, "-m", "veriattn", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "src",
    ).stdout
    assert all(o in shown for o in options if o.startswith("-"))
    assert "KillSignal=SIGTERM" in unit and "ExecReload=/bin/kill -HUP $MAINPID" in unit
