"""`doctor`: its fields, and that it says what is there rather than what one hopes for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.conftest import ROOT, Cli

from veriattn import doctor, native


def test_fields(cli: Cli) -> None:
    done = cli("doctor", "--json")
    found = done.json
    assert done.code == 0
    assert found["native"]["isa"] in found["native"]["available"] and "portable" in found["native"]["available"]
    assert found["cpu"]["features"] == sorted(native.cpu_features())
    assert found["isolation"]["level"] in ("own-user", "same-user", "weak")
    assert found["isolation"]["verifier_non_dumpable"] is True
    assert found["memfd_sealing"] is True
    words = cli("doctor").out
    for key in ("kernels", "gpu", "tee", "isolation", "models", "-> prover", "-> trust"):
        assert key in words


def test_tee_and_gpu_are_found_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TEE_DEVICES", {"tdx": (str(tmp_path / "tdx"),), "sev-snp": (str(tmp_path / "snp"),)})
    assert doctor.examine()["tee"]["kind"] is None
    (tmp_path / "snp").touch()
    assert doctor.examine()["tee"] == {**doctor.examine()["tee"], "kind": "sev-snp", "devices": [str(tmp_path / "snp")]}


@pytest.mark.parametrize(
    ("script", "devices", "reason"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 570.1, 9.0'", 1, ""),
        ("echo 'No devices were found'; exit 6", 0, "No devices were found"),
        ("echo garbage", 0, "garbage"),
    ],
)
def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, devices: int, reason: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = doctor.examine()["gpu"]
    assert len(gpu["devices"]) == devices
    assert gpu["reason"] == reason


def test_no_gpu_library_is_loaded() -> None:
    doctor.examine()
    assert not {"torch", "triton", "pynvml"} & set(sys.modules)


def test_figures_name_this_commit_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    assert doctor.origin()["commit"] == (head.stdout.strip() if (ROOT / ".git").exists() else None)
    # Installed below somebody else's checkout.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert doctor.origin()["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.origin()["commit"] is None
