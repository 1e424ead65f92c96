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

from torch.nn.attention import SDPBackend, sdpa_kernel

import torch
from veriattn import doctor
from veriattn.bench.device import figures
from veriattn.bench.kernels import Result
from veriattn.bench.report import line
from veriattn.prover.cuda import exponential
from veriattn.prover.cuda.attention import Attention, DevicePlan, Plan, RunPlace, Shape, block_rows
from veriattn.prover.cuda.cache import KvPages
from veriattn.prover.cuda.gemm import fits_cublas, gemm_cublas, gemm_i8
from veriattn.spec.kv import PAGE

RESULTS = Path(__file__).with_name("results") / "gpu_kernels.jsonl"
GEMM_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # 8B: qkv, o, gate_up, down
HEADS, KV_HEADS, D = 32, 8, 128
#: From so many rows on a product is bound by arithmetic: a step of a prompt has 1,024.
BAR_ROWS = 1024


def seconds(call: Callable[[], object], repetitions: int = 20) -> float:
    """Median time of a call, by events, with nothing of its operands in L2."""
    for _ in range(3):
        call()
    times, elsewhere = [], torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(repetitions):
        elsewhere.zero_()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return sorted(times)[repetitions // 2]


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def gemm_lines(best_macs: float, read_bytes_per_s: float) -> list[Result]:
    """Each product beside its floor. Bar, for many rows and by the faster way: 60% of the best int8 rate seen on the card."""
    lines, rates = [], {}
    for m in (1, 16, 512, 1024, 2048):
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
                lines.append(line(f"gemm.{name}.{m}x{n}x{k}", t, "s", roofline=floor))
            rates[m, n, k] = m * n * k / min(times.values())
    best = max(best_macs, *rates.values())
    for (m, n, k), rate in rates.items():
        if m >= BAR_ROWS:
            lines.append(
                line(f"gemm.rate.{m}x{n}x{k}", rate / best, "of the best int8 rate", bar=0.6, met=rate >= 0.6 * best)
            )
    return [*lines, line("gemm.best_rate", best, "int8 multiply-adds/s")]


def attention_lines(best_macs: float, used_by_table: bool) -> list[Result]:
    """Bar: at most 3 times bf16 FlashAttention through torch, for the variant that this card's exponential allows."""
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
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                flash = seconds(lambda x=bf16: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True))
            name = f"prefill_attention{'.table' if by_table else ''}.{tokens}"
            # Two products with the values, one with the keys at the very least: each sees half of all pairs.
            floor = 3 * D * HEADS * tokens * (tokens + 1) / 2 / best_macs
            judged = by_table == used_by_table
            lines += [
                line(f"{name}.over_flash", ours / flash, "x FlashAttention bf16", bar=3.0 if judged else None,
                     met=ours <= 3 * flash if judged else None, roofline=floor / flash),
                line(f"{name}.seconds", ours, "s", roofline=floor),
                line(f"{name}.flash_seconds", flash, "s"),
            ]  # fmt: skip
    return lines


def measure(progress: Callable[[str], None]) -> tuple[dict[str, Any], list[Result]]:
    """(what the card is and does, every line). Raises: SystemExit at a wrong product."""
    progress("the card: int8 rate, memory, bus")
    card = figures("cuda")
    exact = exponential.self_test(torch.device("cuda"))
    header = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "self_test": exact, **card}
    progress("products beside cuBLAS")
    lines = gemm_lines(card["macs_per_s"], card["read_bytes_per_s"])
    progress("attention beside FlashAttention")
    best = next(r["value"] for r in lines if r["name"] == "gemm.best_rate")
    return header, lines + attention_lines(best, used_by_table=not exact)


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no CUDA GPU", file=sys.stderr)
        return 1
    header, lines = measure(lambda text: print(text, file=sys.stderr, flush=True))
    header = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **doctor.origin(), **header}
    print(json.dumps(header))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        for found in lines:
            print(json.dumps(found), flush=True)
            out.write(json.dumps({**header, **found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
