"""Constants of the canonical function; docs/spec.md derives them."""

from __future__ import annotations

import math

import numpy as np

SPEC_VERSION = 1

#: Floor and ceiling of every absmax. Inside this domain no operation overflows or makes a subnormal number.
ABSMAX_FLOOR = np.float32(2.0**-20)
ABSMAX_LIMIT = np.float32(2.0**40)

#: Every stored scale lies in this range; every stored bias, table entry and centre is 0 or at least TABLE_FLOOR.
SCALE_MIN = np.float32(2.0**-20)
SCALE_MAX = np.float32(2.0**20)
TABLE_FLOOR = np.float32(2.0**-30)

MAX_IN_FEATURES = 131_071
MAX_KEYS = 131_072

#: log2(e), for the sigmoid and the sampler.
LOG2E = np.float32(1.4426950408889634)

#: 2**f on [-1/2, 1/2], lowest power first; relative error below 1e-7.
EXP2_COEFFICIENTS = tuple(
    np.float32(float.fromhex(c))
    for c in (
        "0x1.000000p+0",
        "0x1.62e430p-1",
        "0x1.ebfbdap-3",
        "0x1.c6aed6p-5",
        "0x1.3b2dfep-7",
        "0x1.5f44f0p-10",
        "0x1.41a6fcp-13",
    )
)
EXP2_LIMIT = np.float32(125.0)
SIGMOID_LIMIT = np.float32(48.0)

#: 15-bit table of 2**(-f/64). The odd factor keeps every entry at least 0.06 away from a rounding tie.
LUT15 = np.array([round(32672.25 * 2.0 ** (-f / 64)) for f in range(64)], dtype=np.int32)
XI_MAX = np.float32(960.0)


def largest_power_of_two_divisor(n: int) -> int:
    """Size of the Hadamard blocks that tile a vector of length n."""
    return n & -n


def query_scale_constant(head_dim: int) -> np.float32:
    """64 * log2(e) / sqrt(head_dim) / hadamard_block, rounded once from binary64."""
    block = largest_power_of_two_divisor(head_dim)
    return np.float32(64.0 * 1.4426950408889634 / math.sqrt(head_dim) / block)
