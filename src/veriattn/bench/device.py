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
    a = torch.ones((size, size), dtype=torch.int8, device=device)
    block = torch.ones(mib << 20, dtype=torch.uint8, device=device)
    there = torch.empty_like(block)
    pinned = torch.ones(block.shape, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    product: Callable[..., Any] = torch._int_mm
    return {
        "macs_per_s": size**3 / _best(device, lambda: product(a, a.t())),
        # A copy reads and writes.
        "read_bytes_per_s": 2 * block.nbytes / _best(device, lambda: there.copy_(block)),
        "to_device_bytes_per_s": block.nbytes / _best(device, lambda: there.copy_(pinned, non_blocking=True)),
        "from_device_bytes_per_s": block.nbytes / _best(device, lambda: pinned.copy_(block, non_blocking=True)),
    }


def _best(device: str, call: Callable[[], object], repetitions: int = 10) -> float:
    def synchronise() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(repetitions + 2):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    print(json.dumps(figures(sys.argv[1])))
