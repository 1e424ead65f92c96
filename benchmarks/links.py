"""`python -m benchmarks.links [MODEL]`: strategies over emulated links: time beside bytes counted on paper, and the overlap.

Ratios are of runs that take turns in one process; the least of several times counts, since other work on a machine
only ever adds. Every line says "emulated".
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.generation import prompt_ids
from veriattn.bench.traffic import Bytes, prompt_bytes
from veriattn.home import resolve_model
from veriattn.native import set_threads
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig
from veriattn.verifier.tiling import Tiling
from veriattn.wire.emulate import Throttle

RESULTS = Path(__file__).with_name("results") / "links.jsonl"
OFF = Tiling(1, 1, pipeline=False)
Cut = Tiling | Literal["auto"] | None


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """One prompt over one link. `check_s`: CPU time of the verifier."""

    seconds: float
    check_s: float
    measured: Bytes


def prefill(
    model: VerifierModel, flow: Flow, prompt: int, chunk: int, link: Throttle | None = None, cut: Cut = None
) -> Prefill:
    """A fresh session, a short prompt to warm up, then the prompt that counts."""
    config = SessionConfig(max_tokens_per_step=chunk, tiling=cut)
    ids = prompt_ids(prompt, model.tensors.config.vocab_size)
    with Session(model, lambda m: ChildProver(m, threads=1, throttle=link), config, flow) as session:
        session.run(Batch((BatchEntry(0, 0, ids[:64]),)))
        channel, cpu, began = session.channel, session.stats.verify_cpu_s, time.monotonic()
        sent, received = channel.bytes_sent, channel.bytes_received
        for start in range(0, prompt, chunk):
            last = start + chunk >= prompt
            session.run(Batch((BatchEntry(1, start, ids[start : start + chunk], "last" if last else "none"),)))
        seconds = time.monotonic() - began
        moved = Bytes(channel.bytes_sent - sent, channel.bytes_received - received)
        return Prefill(seconds, session.stats.verify_cpu_s - cpu, moved)


@dataclass(frozen=True)
class Order:
    """A strategy's prompt over a link: the least of its times, and bytes on paper and on the link."""

    flow: Flow
    seconds: float
    measured: Bytes
    paper: Bytes


def order(model: VerifierModel, gb_per_s: float = 0.5, prompt: int = 1024, repetitions: int = 3) -> list[Order]:
    """run-ahead, veriattn and tsdp in turns, in that order."""
    flows, link, chunk = (Flow.RUN_AHEAD, Flow.VERIATTN, Flow.TSDP), Throttle(gb_per_s), 512
    runs = [[prefill(model, flow, prompt, chunk, link) for flow in flows] for _ in range(repetitions)]
    result = []
    for i, flow in enumerate(flows):
        paper = prompt_bytes(model.tensors.config, flow, prompt, chunk)
        result.append(Order(flow, min(r[i].seconds for r in runs), runs[0][i].measured, paper))
    return result


@dataclass(frozen=True)
class Overlap:
    """`veriattn` with its pipeline and without, at a rate where transfer takes as long as the verifier's work."""

    gb_per_s: float
    prompt: int
    transfer_s: float
    check_s: float
    off_s: float
    on_s: dict[str, float]

    @property
    def ratio(self) -> float:
        """With the default cut."""
        return self.on_s["default"] / self.off_s


def overlap(model: VerifierModel, prompt: int = 3072, repetitions: int = 3) -> Overlap:
    """The prompt in one step, as in the paper. The rate comes from a first run without emulation."""
    free = min((prefill(model, Flow.VERIATTN, prompt, prompt) for _ in range(2)), key=lambda p: p.check_s)
    link = Throttle(round(free.measured.from_prover / free.check_s / 1e9, 3))
    cuts: dict[str, Cut] = {"off": OFF, "default": None, "auto": "auto"}
    runs = [
        {name: prefill(model, Flow.VERIATTN, prompt, prompt, link, cut).seconds for name, cut in cuts.items()}
        for _ in range(repetitions)
    ]
    best = {name: min(r[name] for r in runs) for name in cuts}
    transfer_s = free.measured.from_prover / link.bytes_per_s
    off_s = best.pop("off")
    return Overlap(link.gb_per_s, prompt, transfer_s, free.check_s, off_s, best)


def table_of_order(rows: list[Order], gb_per_s: float, prompt: int) -> str:
    """For people."""
    lines = [f"{prompt}-token prompt over an emulated link of {gb_per_s:g} GB/s"]
    lines.append(f"{'strategy':12}{'seconds':>9}{'to prover':>14}{'on paper':>14}{'from prover':>15}{'on paper':>15}")
    for r in rows:
        to, back = f"{r.measured.to_prover:14,}{r.paper.to_prover:14,}", f"{r.measured.from_prover:15,}"
        lines.append(f"{r.flow.value:12}{r.seconds:9.3f}{to}{back}{r.paper.from_prover:15,}")
    return "\n".join(lines)


def table_of_overlap(o: Overlap) -> str:
    """For people."""
    on = ", ".join(f"{name} {seconds:.3f} s (x{seconds / o.off_s:.3f})" for name, seconds in o.on_s.items())
    return (
        f"{o.prompt}-token prompt over an emulated link of {o.gb_per_s:g} GB/s (transfer {o.transfer_s:.2f} s, "
        f"verifier {o.check_s:.2f} s of CPU)\npipeline off {o.off_s:.3f} s; on: {on}"
    )


def main() -> int:
    set_threads(1)
    model = VerifierModel(resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2"))
    rows = order(model)
    print(table_of_order(rows, 0.5, 1024), flush=True)
    o = overlap(model)
    print(table_of_overlap(o))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "emulated": True}
        for r in rows:
            moved = {"to_prover": r.measured.to_prover, "from_prover": r.measured.from_prover}
            out.write(
                json.dumps({**stamp, "gb_per_s": 0.5, "strategy": r.flow.value, "seconds": r.seconds, **moved}) + "\n"
            )
        out.write(json.dumps({**stamp, **vars(o), "ratio": o.ratio}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
