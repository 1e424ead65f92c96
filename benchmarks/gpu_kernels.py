"""`python -m benchmarks.gpu_kernels`: the kernels on a GPU beside cuBLAS, FlashAttention and memory bandwidth, at real shapes.

Correctness first: every product is compared before it is timed. Prints a table and appends JSON lines to benchmarks/results.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from veriattn import doctor
from veriattn.bench.device import figures
from veriattn.prover.cuda import exponential
from veriattn.prover.cuda.attention import Attention, DevicePlan, Plan, RunPlace, Shape, block_rows
from veriattn.prover.cuda.cache import KvPages
from veriattn.prover.cuda.gemm import fits_cublas, gemm_cublas, gemm_i8
from veriattn.spec.kv import PAGE

RESULTS = Path(__file__).with_name("results") / "gpu_kernels.jsonl"
GEMM_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # 8B: qkv, o, gate_up, down
HEADS, KV_HEADS, D = 32, 8, 128


def seconds(call: Callable[[], object], repetitions: int = 20) -> float:
    """Median time of a call, by events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repetitions):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return sorted(times)[repetitions // 2]


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def gemm_lines(best_macs: float, read_bytes_per_s: float) -> list[dict[str, Any]]:
    """Bar: 60% of the best int8 rate seen on the card, for whichever of the two is faster."""
    lines = []
    for m in (1, 16, 512, 2048):
        for n, k in GEMM_SHAPES:
            a, w = int8(m, k), int8(n, k)
            y, other = (torch.empty((m, n), dtype=torch.int32, device="cuda") for _ in range(2))
            gemm_i8(a, w, y)
            times = {"triton": seconds(lambda a=a, w=w, y=y: gemm_i8(a, w, y))}
            if fits_cublas(m, n, k):
                gemm_cublas(a, w, other)
                if not torch.equal(y, other):
                    raise SystemExit(f"wrong product at {m}, {n}, {k}")
                times["cublas"] = seconds(lambda a=a, w=w, y=other: gemm_cublas(a, w, y))
            floor = max(m * n * k / best_macs, (n * k + m * k + 4 * m * n) / read_bytes_per_s)
            for name, t in times.items():
                lines.append(
                    {
                        "name": f"gemm.{name}.{m}x{n}x{k}",
                        "value": t,
                        "unit": "s",
                        "roofline": floor,
                        "fraction": floor / t,
                    }
                )
    return lines


def attention_lines() -> list[dict[str, Any]]:
    """Bar: at most 3 times bf16 FlashAttention through torch."""
    table = exponential.device_table(torch.device("cuda"))
    lines = []
    for by_table in (False, True):
        attention, shape = Attention(table, by_table), Shape(HEADS, KV_HEADS, 0, KV_HEADS, D)
        for tokens in (1024, 3072, 6144):
            pages = tokens // PAGE
            kv = KvPages(
                int8(pages, KV_HEADS, PAGE, D),
                torch.rand((pages, KV_HEADS, PAGE), device="cuda") / 100,
                int8(pages, KV_HEADS, D, PAGE),
            )
            q, scale = int8(tokens, HEADS, D), torch.rand((tokens, HEADS), device="cuda") / 100
            group = HEADS // KV_HEADS
            plan = Plan.make([RunPlace(0, tokens, 0, tokens, range(pages))], group, block_rows(tokens, group))
            arrays = (torch.from_numpy(x).cuda() for x in (plan.runs_i64, plan.tables_i32, plan.tiles_i32))
            where = DevicePlan(*arrays, plan.block_m, tokens)
            o = torch.empty((tokens, HEADS, D), dtype=torch.int64, device="cuda")
            total = torch.empty((tokens, HEADS), dtype=torch.int32, device="cuda")
            ours = seconds(
                lambda a=attention, s=shape, q=q, c=scale, kv=kv, w=where, o=o, t=total: a.prefill(s, q, c, kv, w, o, t)
            )
            bf16 = [torch.randn((1, HEADS, tokens, D), dtype=torch.bfloat16, device="cuda") for _ in range(3)]
            flash = seconds(lambda x=bf16: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True))
            name = f"prefill_attention{'.table' if by_table else ''}.{tokens}"
            line = {
                "name": name,
                "value": ours / flash,
                "unit": "x FlashAttention bf16",
                "bar": 3.0,
                "met": ours <= 3 * flash,
            }
            lines.append({**line, "seconds": ours, "flash_seconds": flash})
    return lines


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no CUDA GPU", file=sys.stderr)
        return 1
    card = figures("cuda")
    header = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **doctor.origin(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "self_test": exponential.self_test(torch.device("cuda")),
        **card,
    }
    print(json.dumps(header))
    lines = gemm_lines(card["macs_per_s"], card["read_bytes_per_s"]) + attention_lines()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        for line in lines:
            print(json.dumps(line), flush=True)
            out.write(json.dumps({**header, **line}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
