"""No multiply-add of a float kernel is fused: by its results, and in the machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from veriattn.native import _native, kernels

FUSED = re.compile(r"\b(v?f(n?m)(add|sub)\w*[ps][sd]|fml[as]|fn?m(add|sub))\b")


def test_results_are_not_fused(isa: str) -> None:
    # x + (y * w) * a: with (y * w) exact, a fused kernel would round once where ours rounds twice.
    rng = np.random.default_rng(11)
    n = 4096
    y, w = rng.integers(1, 2**12, (1, n), dtype=np.int32), np.ones(n, np.float32)
    x, a = rng.standard_normal((1, n)).astype(np.float32) * np.float32(1000), np.float32([np.pi])
    product = y.astype(np.float64) * np.float64(a[0])
    fused = (x.astype(np.float64) + product).astype(np.float32)
    separate = x + product.astype(np.float32)
    assert np.count_nonzero(fused != separate) > n // 20, "these inputs could not tell the difference"
    assert np.array_equal(kernels.residual_add(x, y, a, w), separate)


def disassemble(path: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_machine_code_has_no_fused_multiply_add() -> None:
    code = disassemble(Path(_native.__file__))
    assert "mulps" in code or "fmul" in code
    assert FUSED.findall(code) == []


@pytest.mark.skipif(
    shutil.which("objdump") is None or shutil.which("c++") is None, reason="needs objdump and a compiler"
)
def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    source, target = tmp_path / "fma.cpp", tmp_path / "fma.o"
    source.write_text("float f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }\n")
    flags = ["-O2", "-mfma"] if "avx2" in kernels.cpu_features() else ["-O2"]
    subprocess.run(["c++", *flags, "-c", source, "-o", target], check=True)
    assert FUSED.findall(disassemble(target))
