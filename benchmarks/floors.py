"""`python -m benchmarks.floors [SHAPE [FILE]]`: what the rooflines say about a machine that is not at hand: nothing is run.

One core of this machine is measured, or its rates are taken from FILE (what a run with --threads 1 --json printed). The TEE of
the table has 16 such cores and 8 times the memory bandwidth of one; the prover is an accelerator by its data sheet, behind a
bus of 15 GB/s. A floor counts no Python, no messages and no waiting: real times are
longer, and ratios of floors are what a strategy could gain at most.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from veriattn.bench.campaign import CHUNK
from veriattn.bench.rates import cpu_side, device_side, with_link
from veriattn.bench.roofline import Floor, LinkRates, Rates, ScoreRates, SideRates, head_floor, layer_floor
from veriattn.bench.shapes import shape
from veriattn.bench.traffic import Part
from veriattn.spec.model import ModelConfig
from veriattn.verifier.session import Flow
from veriattn.wire.emulate import Throttle

CORES, CHANNELS = 16, 8
#: NVIDIA H200 SXM: 1,979 TOPS of dense int8, 4.8 TB/s.
DEVICE = {
    "macs_per_s": 0.99e15, "read_bytes_per_s": 4.8e12, "to_device_bytes_per_s": 5e10, "from_device_bytes_per_s": 5e10,
}  # fmt: skip
FLOWS: dict[str, Flow | None] = {
    "run-ahead": Flow.RUN_AHEAD, "veriattn": Flow.VERIATTN, "tsdp": Flow.TSDP, "full-tee": None,
    "dangerous-unverified": Flow.UNVERIFIED,
}  # fmt: skip


def many_cores(one: SideRates, cores: int = CORES, channels: int = CHANNELS) -> SideRates:
    """So many cores like one that was measured, with so many times its bandwidth: perfect scaling."""

    def per_score(s: ScoreRates) -> ScoreRates:
        return ScoreRates(*(v / cores for v in dataclasses.astuple(s)))

    return SideRates(
        one.macs * cores, one.read * channels, one.copy * channels, one.check / cores, one.token / cores, one.token_one,
        per_score(one.many), per_score(one.one),
    )  # fmt: skip


def measured_before(file: Path) -> SideRates:
    """The TEE's rates of a run of one thread."""
    rates = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])["rates"]["tee"]
    scores = {name: ScoreRates(**rates.pop(name)) for name in ("many", "one")}
    return SideRates(**rates, **scores)


def floors(c: ModelConfig, part: Part, r: Rates) -> dict[str, Floor]:
    """All strategies on one prompt in chunks, or on one token. Limits concern those that share attention."""
    found = {}
    for name, flow in FLOWS.items():
        limit = part.limit if flow in (Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP) else None
        total = head_floor(c, flow, 1, r)
        for first in range(0, part.tokens, CHUNK):
            piece = Part(part.start + first, min(CHUNK, part.tokens - first), limit, part.ratio)
            total += layer_floor(c, flow, [piece], r)[0] * c.num_layers
        found[name] = total
    return found


def best_ratio(c: ModelConfig, part: Part, r: Rates) -> float:
    """The offload ratio with the least floor under `veriattn`."""
    tried = [p / 20 for p in range(21)]
    return min(tried, key=lambda p: floors(c, dataclasses.replace(part, ratio=p), r)["veriattn"].seconds)


def main() -> int:
    c = shape(sys.argv[1] if len(sys.argv) > 1 else "llama-8b")
    tee = many_cores(cpu_side(c, 1) if len(sys.argv) < 3 else measured_before(Path(sys.argv[2])))
    r = with_link(Rates(tee, device_side(c, DEVICE), LinkRates(5e10, 5e10), CORES, None, CORES), Throttle(15))
    longest = Part(10_000, 1, limit=2000)
    points = {
        "prompt of 6,144": Part(0, 6144),
        "token at 10,000": Part(10_000, 1),
        "token at 10,000, prover keeps 2,000": dataclasses.replace(longest, ratio=best_ratio(c, longest, r)),
    }
    for what, part in points.items():
        print(f"\n{what}" + (f", p = {part.ratio:g}" if part.limit else ""))
        print(
            f"{'strategy':22}{'floor s':>10}{'limit':>8}{'prover':>10}{'link':>10}{'tee':>10}{'tsdp/it':>9}{'tee/it':>8}"
        )
        found = floors(c, part, r)
        for name, f in found.items():
            over = [found[b].seconds / f.seconds for b in ("tsdp", "full-tee")]
            print(
                f"{name:22}{f.seconds:10.4f}{f.limit:>8}{f.prover:10.4f}{f.link:10.4f}{f.tee:10.4f}{over[0]:9.2f}{over[1]:8.2f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
