"""What the compiler makes of the kernels for sm_90, without a GPU: exact operations only, and tensor cores on int8."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.gpu import ptx

ROOT = Path(__file__).resolve().parents[2]
WITH_PRODUCTS = {"gemm_i8_kernel", "prefill_kernel", "scores_kernel", "values_kernel"}
WITH_EXPONENTIAL = {"prefill_kernel", "values_kernel", "exponential_kernel"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Facts of every kernel. In a process of its own: here kernels are interpreted, not compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.ptx", "--few"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(found: list[dict[str, Any]]) -> None:
    assert {f["kernel"] for f in found} == {
        "attention_epilogue_kernel", "dequantise_kernel", "exponential_kernel", "gather_rows_kernel", "gemm_i8_kernel",
        "norm_quantise_kernel", "prefill_kernel", "qkv_kernel", "quantise_kernel", "scores_kernel", "silu_hadamard_kernel",
        "values_kernel",
    }  # fmt: skip


def test_nothing_is_fused_and_everything_is_rounded(found: list[dict[str, Any]]) -> None:
    assert [f["name"] for f in found if f["fused"] or f["unrounded"] or f["float_mma"]] == []


def test_nothing_flushes_or_approximates_but_the_tested_exponential(found: list[dict[str, Any]]) -> None:
    """exp2 is called with the 64 arguments that the start-up test runs through; neither they nor its results are subnormal."""
    for f in found:
        allowed = ["ex2.approx.ftz.f32"] if f["kernel"] in WITH_EXPONENTIAL else []
        assert f["flushing"] in ([], allowed), f["name"]
        assert f["approximate"] in ([], allowed), f["name"]
    by_table = [f for f in found if "table" in f["name"] and f["kernel"] in WITH_PRODUCTS]
    assert by_table and all(not f["approximate"] for f in by_table)


def test_products_run_on_tensor_cores(found: list[dict[str, Any]]) -> None:
    for f in found:
        assert bool(f["mma"]) == (f["kernel"] in WITH_PRODUCTS), f["name"]
    large = [f for f in found if f["kernel"] in ("gemm_i8_kernel", "prefill_kernel") and ",512]" in f["name"]]
    assert large and all(any(m.startswith("wgmma") for m in f["mma"]) for f in large)


def test_shared_memory_fits(found: list[dict[str, Any]]) -> None:
    """227 KiB per block on sm_90."""
    assert max(f["shared_bytes"] for f in found) <= 227 << 10


def test_the_inspection_finds_what_it_looks_for() -> None:
    text = """
        fma.rn.f32 %f1, %f2, %f3, %f4;
        @%p1 mul.f32 %f1, %f2, %f3;
        add.rn.ftz.f32 %f1, %f2, %f3;
        div.full.f32 %f1, %f2, %f3;
        mul.rn.f32 %f1, %f2, %f3;
        mad.lo.s32 %r1, %r2, %r3, %r4;
        wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%r1}, %rd1, %rd2, 1, 1;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f2};
    """
    facts = ptx.facts(text)
    assert facts["fused"] == ["fma.rn.f32"]
    assert facts["unrounded"] == ["mul.f32"]
    assert facts["flushing"] == ["add.rn.ftz.f32"]
    assert facts["approximate"] == ["div.full.f32"]
    assert facts["mma"] == ["wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"]
    assert facts["float_mma"] == ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"]
