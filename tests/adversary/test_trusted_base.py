"""What the trusted part loads, and what no module of ours imports; each test has a control that fails."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import veriattn

PACKAGE = Path(veriattn.__file__).parent
TRUSTED = sorted(
    f"veriattn.verifier.{path.stem}" for path in (PACKAGE / "verifier").glob("*.py") if path.stem not in ("__init__",)
)
NEVER_LOADED = {"torch", "triton", "transformers", "tokenizers", "jinja2", "click", "gguf", "safetensors"}
NEVER_OURS = {"prover", "engine", "convert", "redteam", "server", "cli", "client", "floatmode"}
#: Ways to run what a byte string says.
NEVER_IMPORTED = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
    "copyreg",
}
NEVER_CALLED = {"eval", "exec", "__import__"}

REPORT = """
import sys
{extra}
import {modules}
print(*sorted(sys.modules))
"""

GUARDED = """
import pickle, sys
def refuse(*_, **__):
    raise AssertionError("something was unpickled")
pickle.loads = pickle.load = pickle.Unpickler = pickle._Unpickler = refuse
from pathlib import Path
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Session
{extra}
with Session(VerifierModel(Path(sys.argv[1])), ChildProver) as session:
    print(session.run(Batch((BatchEntry(0, 0, (1, 2, 3)),))).shape)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def loaded(modules: list[str], extra: str = "") -> set[str]:
    done = run(REPORT.format(modules=", ".join(modules), extra=extra))
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def strangers(modules: set[str]) -> set[str]:
    """Modules that the trusted part must not load."""
    ours = {m for m in modules if m.startswith("veriattn.") and m.split(".")[1] in NEVER_OURS}
    return ours | {m for m in modules if m.split(".")[0] in NEVER_LOADED}


def test_there_are_trusted_modules() -> None:
    assert {"veriattn.verifier.session", "veriattn.verifier.keys", "veriattn.verifier.checks"} <= set(TRUSTED)


def test_the_verifier_loads_no_stranger() -> None:
    modules = loaded(["veriattn.verifier", *[m for m in TRUSTED if not m.endswith("launch_shim")]])
    assert "veriattn.verifier.session" in modules and "numpy" in modules
    assert strangers(modules) == set()


@pytest.mark.parametrize("module", ["veriattn.verifier", *TRUSTED])
def test_each_trusted_module_alone(module: str) -> None:
    assert strangers(loaded([module])) == set()


@pytest.mark.parametrize(
    "extra", ["import veriattn.prover.serve", "import veriattn.engine.engine", "import tokenizers"]
)
def test_a_stranger_would_be_seen(extra: str) -> None:
    assert strangers(loaded(["veriattn.verifier.session"], extra)) != set()


@pytest.mark.parametrize("layer", ["spec.forward", "wire.channel", "native"])
def test_layers_below_load_nothing_above(layer: str) -> None:
    above = {m for m in loaded([f"veriattn.{layer}"]) if m.startswith("veriattn.verifier")}
    assert above == set()


def imported(source: str) -> Iterator[str]:
    """Top-level names of all imports, and forbidden calls as `name()`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NEVER_CALLED:
            yield f"{node.func.id}()"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield "allow_pickle"
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load")
            and not any(k.arg == "allow_pickle" for k in node.keywords)
        ):
            yield ast.unparse(node.func)


FORBIDDEN = (
    NEVER_IMPORTED | {f"{name}()" for name in NEVER_CALLED} | {"allow_pickle", "torch.load", "np.load", "numpy.load"}
)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_of_ours_can_run_what_bytes_say(path: Path) -> None:
    assert set(imported(path.read_text())) & FORBIDDEN == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import os, pickle as p", "from pickle import loads", "def f():\n    import marshal", "eval('1')",
        "import numpy as np\nnp.load('x')", "f(allow_pickle=True)", "import yaml",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert set(imported(source)) & FORBIDDEN != set()


def test_a_session_unpickles_nothing(tiny_model: Path) -> None:
    done = run(GUARDED.format(extra=""), str(tiny_model))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, ")


def test_an_unpickling_session_would_be_seen(tiny_model: Path) -> None:
    done = run(GUARDED.format(extra="pickle.loads(b'N.')"), str(tiny_model))
    assert done.returncode == 1
    assert "something was unpickled" in done.stderr
