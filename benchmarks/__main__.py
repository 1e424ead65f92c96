"""`python -m benchmarks [MODEL]`: generation speed by strategy and batch, printed and appended to benchmarks/results."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.generation import measure
from veriattn import doctor
from veriattn.convert.pull import pull
from veriattn.engine.strategies import STRATEGIES
from veriattn.home import resolve_model
from veriattn.native import get_threads, kernels

RESULTS = Path(__file__).with_name("results") / "generation.jsonl"


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    if name == "smollm2":
        pull(name, kernels=kernels)
    header = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **doctor.origin(),
        "threads": get_threads(),
        "model": name,
    }
    print(f"{header['cpu']}, {header['cores']} cores, {header['isa']}, {header['threads']} threads; {name}")
    print(
        f"{'strategy':22}{'batch':>6}{'prefill tok/s':>15}{'decode tok/s':>14}{'verifier CPU s':>16}{'from prover MB':>16}"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        for batch in (1, 8):
            for strategy in STRATEGIES:
                s = measure(resolve_model(name), strategy, batch=batch)
                print(
                    f"{strategy:22}{batch:6}{s.prefill_tokens_per_s:15.1f}{s.decode_tokens_per_s:14.1f}"
                    f"{s.verify_cpu_s:16.2f}{s.from_prover_bytes / 1e6:16.1f}",
                    flush=True,
                )
                out.write(json.dumps({**header, **s.to_json()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
