"""On a GPU (`make test-gpu`): every kernel against spec.reference, the whole backend against the CPU backend, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.gpu import backends, kernels
from tests.gpu.sessions import check_flows, check_prompt

from veriattn.prover.cuda import exponential, launch
from veriattn.spec.forward import BatchEntry
from veriattn.verifier.launch import builtin_prover
from veriattn.wire.messages import AttentionCheck

#: Sizes of a real layer, so that every branch of the launchers' choices is taken.
REAL = {
    "hidden_size": 1024,
    "num_heads": 16,
    "num_kv_heads": 4,
    "head_dim": 128,
    "intermediate_size": 3584,
    "vocab_size": 2048,
}
SMOLLM2 = {
    "hidden_size": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 1024,
    "max_positions": 4096,
}


@pytest.fixture(scope="module")
def device() -> kernels.Device:
    return kernels.Device("cuda")


def test_kernels_run_on_the_gpu() -> None:
    assert not launch.interpreted()


def test_the_exponential_of_this_gpu_is_the_table(device: kernels.Device) -> None:
    """Where this fails attention still has the right bits, by the table, and is slower."""
    assert exponential.self_test(device.torch, by_table=True)
    assert exponential.self_test(device.torch)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 6144, 4096), (3, 300, 64), (17, 8, 24), (40, 129, 96), (64, 4096, 14336), (130, 24, 520), (512, 6144, 4096),
     (700, 1000, 1000)],
)  # fmt: skip
def test_gemm(device: kernels.Device, shape: tuple[int, int, int]) -> None:
    kernels.check_gemm(device, *shape)


@pytest.mark.parametrize("m", [2, 130])
def test_gemm_at_the_end_of_its_range(device: kernels.Device, m: int) -> None:
    kernels.check_gemm(device, m, 3, 131071, extreme=True)


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (40, 67), (9, 5000), (300, 4096), (3, 131071)])
def test_norm(device: kernels.Device, shape: tuple[int, int]) -> None:
    kernels.check_norm(device, *shape)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 2.0**40, -(2.0**40)])
def test_norm_notices_what_is_out_of_range(device: kernels.Device, value: float) -> None:
    kernels.check_norm_flags(device, value)


@pytest.mark.parametrize("shape", [(1, 1), (35, 100), (300, 4096)])
def test_residual_and_logits(device: kernels.Device, shape: tuple[int, int]) -> None:
    kernels.check_residual(device, *shape)
    kernels.check_gather(device, *shape)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 96), (33, 40), (2, 1536), (100, 14336), (5, 13824), (2, 17920), (2, 8192)]
)
@pytest.mark.parametrize("gain", [1.0, 8.0, 1e-5])
def test_mlp(device: kernels.Device, shape: tuple[int, int], gain: float) -> None:
    kernels.check_mlp(device, *shape, gain=gain)


def test_mlp_notices_what_is_out_of_range(device: kernels.Device) -> None:
    kernels.check_mlp_flags(device)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (33, 6, 3, 24), (300, 32, 8, 128)])
def test_attention_epilogue(device: kernels.Device, shape: tuple[int, int, int, int]) -> None:
    kernels.check_epilogue(device, *shape)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        REAL,
        SMOLLM2,
        {"qkv_bias": True, "k_center": True, "qk_norm": True, "head_dim": 24, "rotary_dim": 18, "num_kv_heads": 1},
        {"head_dim": 24, "rotary_dim": 18, "num_heads": 6, "num_kv_heads": 3},
        {"head_dim": 80, "rotary_dim": 60, "num_kv_heads": 1, "qk_norm": True},
    ],
)  # fmt: skip
def test_qkv(device: kernels.Device, switches: dict[str, Any]) -> None:
    kernels.check_qkv(device, 77, **switches)


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize("kind", ["random", "flat", "extreme"])
@pytest.mark.parametrize(
    "case",
    [
        ([(0, 1)], 1, 1, 8),
        ([(0, 40)], 4, 2, 16),
        ([(0, 3), (300, 5), (256, 1)], 9, 3, 24),
        ([(0, 300), (511, 1), (700, 130)], 32, 8, 128),
        ([(0, 200), (1000, 3)], 9, 3, 64),
        ([(200, 70)], 2, 2, 80),
        ([(3000, 1), (10, 1), (0, 1)], 40, 8, 128),
    ],
)
def test_attention(device: kernels.Device, case: Any, kind: str, by_table: bool) -> None:
    kernels.check_attention(device, by_table, *case, kind=kind)


def test_weighted_values(device: kernels.Device) -> None:
    kernels.check_weighted_values(device, [(300, 5)], 6, 3, 24)
    kernels.check_weighted_values(device, [(1000, 200)], 32, 8, 128)


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize(("resident", "rows"), [(1, 1), (300, 3), (512, 1), (1000, 40)])
def test_share(device: kernels.Device, resident: int, rows: int, by_table: bool) -> None:
    kernels.check_share(device, by_table, resident, rows)


@pytest.mark.parametrize("changes", [*backends.MODELS.values(), REAL, SMOLLM2])
def test_backend(make_model: Callable[..., Path], changes: dict[str, Any]) -> None:
    """Odd and real sizes; the chunk of 700 rows runs ahead through more layers than there are slots."""
    pair = backends.Pair(make_model(num_layers=5, **changes), "cuda")
    backends.check_steps(pair, 700)
    backends.check_operations(pair)
    backends.check_ahead(pair, 200, 3)
    backends.check_straight(pair, 150)
    backends.check_greedy(pair, 300, 40)


@pytest.mark.parametrize("check", AttentionCheck)
def test_decode_by_graphs(make_model: Callable[..., Path], check: AttentionCheck) -> None:
    """Sequences that grow over the end of a page, one that joins, one that leaves: captured, repeated and captured anew."""
    pair = backends.Pair(make_model(num_layers=4, **SMOLLM2), "cuda")
    starts = {1: 250, 2: 20, 3: 2045}
    for seq_id, start in starts.items():
        at = 0
        while at < start:
            count = min(1024, start - at)
            pair.step(check, BatchEntry(seq_id, at, backends.tokens(pair.config, f"{seq_id}", count), "none"))
            at += count
    for position in range(12):
        live = (1, 2) if position in (0, 1, 2, 3) else (1, 2, 3) if position < 9 else (3,)
        pair.step(check, *(BatchEntry(s, starts[s], (7 + position,), "last") for s in live))
        for s in live:
            starts[s] += 1
    pair.free(*starts)
    assert pair.cuda.nonzero_bytes() == 0


def test_sessions_of_every_flow(make_model: Callable[..., Path]) -> None:
    """The real prover process on the GPU, checked by the verifier."""
    check_flows(make_model(num_layers=3), builtin_prover("cuda"))


def test_a_long_prompt_through_a_pinned_ring(make_model: Callable[..., Path]) -> None:
    """Claims of tens of megabytes, which the device writes into the ring; each chunk is known while the last is checked."""
    path = make_model(num_layers=4, **REAL)
    check_prompt(path, builtin_prover("cuda"), 2500, 700)
