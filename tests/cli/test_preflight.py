"""tools/preflight.sh finds what is missing and prints the README's first line of set-up; it needs no Python to do so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASICS = ("sh", "uname", "df", "awk", "dirname", "printf", "head", "grep", "cat")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: everything that is needed, to be taken away from."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in BASICS:
        if (program := shutil.which(name)) is not None:
            (bin_ / name).symlink_to(program)
    for name in ("c++", "as", "ld"):
        program = shutil.which(name)
        assert program is not None
        script(bin_ / name, f'exec {program} "$@"')
    script(bin_ / "python3", f'exec {sys.executable} "$@"')
    return bin_


def script(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!{shutil.which('sh')}\n{body}\n")
    path.chmod(0o755)


def preflight(machine: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine), "LC_ALL": "C", **settings}
    shell = shutil.which("sh")
    assert shell is not None
    command = [shell, "tools/preflight.sh"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def apt_line() -> str:
    found = re.search(r"^APT_LINE='(.*)'$", (ROOT / "tools" / "preflight.sh").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert words in done.stderr
    assert done.stderr.splitlines()[-1].strip() == apt_line()


def test_a_machine_that_has_all(machine: Path) -> None:
    done = preflight(machine)
    assert (done.returncode, done.stdout, done.stderr) == (0, "python3\n", "")


def test_no_compiler(machine: Path) -> None:
    (machine / "c++").unlink()
    refused(preflight(machine), "C++ compiler")


def test_a_compiler_without_its_headers(machine: Path) -> None:
    script(machine / "c++", "exit 1")
    refused(preflight(machine), "working C++17 compiler")


def test_no_python(machine: Path) -> None:
    (machine / "python3").unlink()
    refused(preflight(machine), "Python 3.11 or newer (python3 is missing)")


def test_old_python(machine: Path) -> None:
    # A shim that starts nothing does not count; the newest that works is taken.
    script(machine / "python3", 'case "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac')
    script(machine / "python3.13", "exit 127")
    refused(preflight(machine), "Python 3.11 or newer (python3 is 3.9)")
    script(machine / "python3.12", f'exec {sys.executable} "$@"')
    done = preflight(machine)
    assert (done.returncode, done.stdout) == (0, "python3.12\n")


def test_no_venv_module(machine: Path) -> None:
    script(machine / "python3", f'case "$2" in *venv*) exit 1 ;; esac\nexec {sys.executable} "$@"')
    refused(preflight(machine), "the venv module of python3 (package python3-venv)")


def test_no_python_header(machine: Path, tmp_path: Path) -> None:
    script(machine / "python3", f'case "$2" in *sysconfig*) echo {tmp_path} ;; *) exec {sys.executable} "$@" ;; esac')
    refused(preflight(machine), "Python.h of python3 (package python3-dev)")


def test_full_disk(machine: Path) -> None:
    refused(preflight(machine, MIN_FREE_MB=str(2**40)), "MB free")


def test_a_named_python_is_taken_or_refused(machine: Path) -> None:
    assert preflight(machine, PYTHON=sys.executable).stdout == f"{sys.executable}\n"
    refused(preflight(machine, PYTHON="/bin/false"), "PYTHON=/bin/false")


def test_another_system(machine: Path) -> None:
    script(machine / "uname", 'case "$1" in -s) echo Darwin ;; *) echo arm64 ;; esac')
    done = preflight(machine)
    assert done.returncode == 1 and "runs on Linux" in done.stderr


def test_the_readme_begins_set_up_with_the_same_line() -> None:
    blocks = re.findall(
        r"^```(?:sh|bash|console)\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks[0].splitlines()[0] == apt_line()


def test_the_makefile_asks_for_no_privileges() -> None:
    for name in ("Makefile", "tools/env.sh", ".ci/run"):
        assert "sudo" not in re.sub(r"#.*|no sudo", "", (ROOT / name).read_text())
