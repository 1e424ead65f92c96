"""`python -m benchmarks.shield [MODEL]`: time per token under each KV shield over that without, in turns in one run.

Three sessions live side by side and decode one token each in turn, so that whatever else the machine does meets all of
them alike. The ratio is the median over the turns of a shielded token's time over that of the plain token beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.generation import prompt_ids
from veriattn import doctor
from veriattn.home import resolve_model
from veriattn.native import set_threads
from veriattn.shield.permutation import ShieldMode
from veriattn.spec.forward import Batch, BatchEntry
from veriattn.verifier.launch import ChildProver
from veriattn.verifier.model import VerifierModel
from veriattn.verifier.session import Flow, Session, SessionConfig

RESULTS = Path(__file__).with_name("results") / "shield.jsonl"
MODES: tuple[ShieldMode, ...] = ("off", "static", "session")


@dataclass(frozen=True)
class Cost:
    """Medians. seconds: of a token; verifier_cpu_s: in the verifier. ratio: to `off`, turn by turn; spread: its quartiles."""

    seconds: float
    verifier_cpu_s: float
    ratio: float
    spread: tuple[float, float]


def measure(
    model: VerifierModel, flow: Flow = Flow.VERIATTN, prompt: int = 200, tokens: int = 120, warm_up: int = 10
) -> dict[str, Cost]:
    """Decode `tokens` tokens after a prompt under each mode. One thread each for verifier and prover is the caller's choice."""
    ids = prompt_ids(prompt, model.tensors.config.vocab_size)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu: dict[str, list[float]] = {mode: [] for mode in MODES}
    with ExitStack() as stack:
        sessions = {
            mode: stack.enter_context(
                Session(model, lambda m: ChildProver(m, threads=1), SessionConfig(kv_shield=mode), flow)
            )
            for mode in MODES
        }
        logits = {mode: s.run(Batch((BatchEntry(0, 0, ids, "last"),))) for mode, s in sessions.items()}
        for turn in range(warm_up + tokens):
            for place in range(len(MODES)):
                mode = MODES[(place + turn) % len(MODES)]  # nobody is always the first
                batch = Batch((BatchEntry(0, prompt + turn, (int(logits[mode][0].argmax()),), "last"),))
                start, start_cpu = time.perf_counter(), time.process_time()
                logits[mode] = sessions[mode].run(batch)
                if turn >= warm_up:
                    times[mode].append(time.perf_counter() - start)
                    cpu[mode].append(time.process_time() - start_cpu)
    costs = {}
    for mode in MODES:
        ratios = sorted(a / b for a, b in zip(times[mode], times["off"], strict=True))
        quarter = len(ratios) // 4
        costs[mode] = Cost(
            statistics.median(times[mode]),
            statistics.median(cpu[mode]),
            statistics.median(ratios),
            (ratios[quarter], ratios[-1 - quarter]),
        )
    return costs


def table(costs: dict[str, Cost]) -> str:
    """For people."""
    lines = [f"{'shield':10}{'ms per token':>14}{'verifier CPU ms':>17}{'of off':>9}{'quartiles':>16}"]
    for mode, c in costs.items():
        spread = f"{c.spread[0]:.3f} to {c.spread[1]:.3f}"
        lines.append(f"{mode:10}{c.seconds * 1e3:14.2f}{c.verifier_cpu_s * 1e3:17.2f}{c.ratio:9.3f}{spread:>16}")
    return "\n".join(lines)


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    set_threads(1)
    costs = measure(VerifierModel(resolve_model(name)))
    print(table(costs))
    header = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **doctor.origin(),
        "model": name,
        "strategy": Flow.VERIATTN.value,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        for mode, cost in costs.items():
            out.write(json.dumps({**header, "kv_shield": mode, **asdict(cost)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
