"""Every kernel through Triton's interpreter, bit for bit with spec.reference: random, extreme and odd shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.gpu import kernels

from veriattn.prover.cuda import exponential, launch

DEVICE = kernels.Device("cpu")


def test_kernels_are_interpreted() -> None:
    assert launch.interpreted()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 64), (17, 8, 24), (2, 130, 257), (40, 129, 96), (130, 24, 520)])
def test_gemm(shape: tuple[int, int, int]) -> None:
    kernels.check_gemm(DEVICE, *shape)


def test_gemm_at_the_end_of_its_range() -> None:
    """127 * 127 * 131071 < 2**31, with every term of the same sign."""
    kernels.check_gemm(DEVICE, 2, 3, 131071, extreme=True)


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (40, 67), (9, 5000)])
def test_norm(shape: tuple[int, int]) -> None:
    kernels.check_norm(DEVICE, *shape)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 2.0**40, -(2.0**40)])
def test_norm_notices_what_is_out_of_range(value: float) -> None:
    kernels.check_norm_flags(DEVICE, value)


@pytest.mark.parametrize("shape", [(1, 1), (35, 100), (3, 1500)])
def test_residual_and_logits(shape: tuple[int, int]) -> None:
    kernels.check_residual(DEVICE, *shape)
    kernels.check_gather(DEVICE, *shape)


@pytest.mark.parametrize("shape", [(1, 1), (3, 96), (33, 40), (2, 1536), (2, 4096)])
def test_mlp(shape: tuple[int, int]) -> None:
    kernels.check_mlp(DEVICE, *shape)


def test_mlp_over_the_whole_range_of_the_exponential() -> None:
    kernels.check_mlp(DEVICE, 40, 64, gain=8.0)
    kernels.check_mlp(DEVICE, 40, 64, gain=1e-5)


def test_mlp_notices_what_is_out_of_range() -> None:
    kernels.check_mlp_flags(DEVICE)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 4, 2, 16), (33, 6, 3, 24), (2, 10, 5, 128)])
def test_attention_epilogue(shape: tuple[int, int, int, int]) -> None:
    kernels.check_epilogue(DEVICE, *shape)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"qkv_bias": True, "k_center": True},
        {"qk_norm": True},
        {"qkv_bias": True, "k_center": True, "qk_norm": True, "head_dim": 24, "rotary_dim": 18, "num_kv_heads": 1},
        {"head_dim": 24, "rotary_dim": 18, "num_heads": 6, "num_kv_heads": 3},
        {"head_dim": 80, "rotary_dim": 60, "num_kv_heads": 1},
    ],
)  # fmt: skip
def test_qkv(switches: dict[str, Any]) -> None:
    kernels.check_qkv(DEVICE, 11, **switches)


ATTENTION = [
    ([(0, 1)], 1, 1, 8),
    ([(0, 40)], 4, 2, 16),
    ([(0, 3), (300, 5), (256, 1)], 9, 3, 24),  # a group of three, pages out of order, a page's first key
    ([(509, 4)], 10, 2, 128),
    ([(200, 70)], 2, 2, 80),
]


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: Any, by_table: bool) -> None:
    kernels.check_attention(DEVICE, by_table, *case)


@pytest.mark.parametrize("kind", ["flat", "extreme"])
def test_attention_of_other_numbers(kind: str) -> None:
    kernels.check_attention(DEVICE, False, [(250, 9), (3, 1)], 4, 2, 16, kind=kind)


def test_weighted_values() -> None:
    kernels.check_weighted_values(DEVICE, [(300, 5)], 6, 3, 24)


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize(("resident", "rows"), [(1, 1), (300, 3), (512, 1)])
def test_share(resident: int, rows: int, by_table: bool) -> None:
    kernels.check_share(DEVICE, by_table, resident, rows)


def test_exponential_passes_here() -> None:
    assert exponential.self_test(DEVICE.torch)
    assert exponential.self_test(DEVICE.torch, by_table=True)
