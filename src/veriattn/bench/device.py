"""`python -m veriattn.bench.device cuda`: int8 rate, memory and bus bandwidth of a device, as one line of JSON; needs torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def figures(device: str, size: int = 8192, mib: int = 512) -> dict[str, float]:
    """Best of several; operands and bytes as large as given. Raises: RuntimeError where torch has no such device."""
    # Random operands: a card draws less power on constants, and clocks higher than it ever does on real data.
    a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    block = torch.ones(mib << 20, dtype=torch.uint8, device=device)
    there = torch.empty_like(block)
    pinned = torch.ones(block.shape, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    product: Callable[..., Any] = torch._int_mm
    return {
        # The second operand as cuBLAS wants it: column after column.
        "macs_per_s": size**3 / _best(device, lambda: product(a, b.t())),
        # A copy reads and writes.
        "read_bytes_per_s": 2 * block.nbytes / _best(device, lambda: there.copy_(block)),
        "to_device_bytes_per_s": block.nbytes / _best(device, lambda: there.copy_(pinned, non_blocking=True)),
        "from_device_bytes_per_s": block.nbytes / _best(device, lambda: pinned.copy_(block, non_blocking=True)),
    }


def _best(device: str, call: Callable[[], object], repetitions: int = 10) -> float:
    """Least seconds of a call, on a GPU by its own clock; the first calls do not count."""
    seconds = _by_events if device.startswith("cuda") else _by_the_clock
    for _ in range(3):
        call()
    return min(seconds(call) for _ in range(repetitions))


def _by_events(call: Callable[[], object]) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000


def _by_the_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(figures(sys.argv[1])))
