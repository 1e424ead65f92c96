"""The exhaustive start-up test of the device's exp2: all 64 table entries and all 961 weights, or the table is used."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

import torch
from veriattn.prover.cuda import numerics as nm
from veriattn.prover.cuda.launch import launch
from veriattn.spec.constants import LUT15

#: Exponents of `reference.weights_below`: rint of 0 .. 960.
_EXPONENTS = 961


@triton.jit
def exponential_kernel(entry_ptr, weight_ptr, lut_ptr, COUNT: tl.constexpr, TABLE: tl.constexpr):
    """Entry f for every f, and P for every exponent 0 .. COUNT - 1, by the code that attention runs."""
    f = tl.arange(0, 64)
    tl.store(entry_ptr + f, nm.table_entry(f))
    xi = tl.arange(0, COUNT)
    p = nm.attention_weight(-xi.to(tl.float32), tl.zeros((COUNT,), tl.float32), 1.0, lut_ptr, TABLE)
    tl.store(weight_ptr + xi, p)


def device_table(device: torch.device) -> torch.Tensor:
    """LUT15 on the device."""
    return torch.from_numpy(LUT15.copy()).to(device)


def self_test(device: torch.device, by_table: bool = False) -> bool:
    """Whether every entry and every weight that the device computes is that of the specification.

    Exhaustive: attention calls the exponential with these 64 arguments and no others. False (or a kernel that is wrong for any
    other reason) means that attention reads the table.
    """
    entries = torch.zeros(64, dtype=torch.int32, device=device)
    weights = torch.zeros(1024, dtype=torch.int32, device=device)
    launch(exponential_kernel, (1,), entries, weights, device_table(device), COUNT=1024, TABLE=by_table)
    xi = np.arange(_EXPONENTS)
    expected = ((LUT15[xi & 63] >> (xi >> 6)) + 1) >> 1
    same_weights = np.array_equal(weights.cpu().numpy()[:_EXPONENTS], expected)
    return same_weights and (by_table or np.array_equal(entries.cpu().numpy(), LUT15))
