"""Where the prover runs: what a machine without a GPU says, and that nothing loads GPU libraries unasked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import veriattn
from veriattn.cli import main
from veriattn.errors import EXIT_PROVER, ProverFault
from veriattn.prover.devices import DEVICES
from veriattn.verifier.launch import ChildProver, builtin_prover
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Session, SessionConfig


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, the prover sees none of it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_machine_without_a_gpu_is_told_so(tiny_model: Path) -> None:
    model = VerifierModel(tiny_model)
    with pytest.raises(ProverFault, match="error 5: --device cuda") as caught:
        Session(model, lambda m: ChildProver(m, builtin_prover("cuda"), timeout_s=60.0), SessionConfig())
    assert caught.value.exit_code == EXIT_PROVER
    assert "use --device cpu" in str(caught.value.hint)


def test_the_command_line_says_it_too(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "-m", str(tiny_model), "--raw", "ab", "--device", "cuda", "--max-tokens", "1", "--json"]
    assert main(arguments) == EXIT_PROVER
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "prover_fault"
    assert "hint:" in err and "--device cpu" in err


def test_the_cpu_prover_loads_no_gpu_library() -> None:
    code = "import sys, veriattn.prover.__main__; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(Path(veriattn.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_devices_are_those_of_the_command_line() -> None:
    assert DEVICES == ("cpu", "cuda")
