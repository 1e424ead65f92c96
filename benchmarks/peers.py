"""`make bench-peers`: decoding by `full-tee` beside llama.cpp (`llama-cpp-python`), the same model as Q8_0, in turns.

llama.cpp lives in an environment of its own, in a process of its own (benchmarks/peer_llama.py): nothing of it is ever
imported here. Rounds take turns, so that other work on the machine meets both; medians count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.generation import prompt_ids
from veriattn import doctor
from veriattn.convert.pull import PUBLISHED, pull
from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.home import resolve_model, sources_directory, state_directory
from veriattn.native import get_threads, kernels, set_threads

RESULTS = Path(__file__).with_name("results") / "peers.jsonl"
BAR = 0.8
PROMPT, TOKENS = 32, 64


class Peer:
    """llama.cpp over a line protocol."""

    def __init__(self, python: Path, source: Path, quantised: Path, threads: int) -> None:
        self._log = quantised.with_suffix(".log").open("w", encoding="utf-8")
        script = Path(__file__).with_name("peer_llama.py")
        self._process = subprocess.Popen(
            [python, script, source, quantised, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        if self._process.stdin is None or self._process.stdout is None:
            raise SystemExit("no pipes to llama.cpp")
        self._to, self._from = self._process.stdin, self._process.stdout
        self.about = json.loads(self._line())

    def _line(self) -> str:
        line = self._from.readline()
        if not line:
            raise SystemExit(f"llama.cpp has ended: {self._log.name} says why")
        return line

    def rate(self, prompt: int, tokens: int) -> float:
        """Tokens per second of decoding after a prompt."""
        self._to.write(f"{prompt} {tokens}\n")
        self._to.flush()
        return tokens / float(json.loads(self._line())["decode_s"])

    def close(self) -> None:
        self._to.close()
        self._process.wait(30)
        self._log.close()


def our_rate(engine: Engine, prompt: int, tokens: int) -> float:
    """Tokens per second of decoding after a prompt."""
    vocab = engine.model.manifest.config.vocab_size
    seq = engine.submit(Request(prompt_ids(prompt, vocab), max_tokens=tokens + 1, ignore_eos=True))
    while not engine.states[seq].output_ids:
        engine.step()
    start = time.perf_counter()
    engine.run_all()
    seconds = time.perf_counter() - start
    engine.forget(seq)
    return tokens / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--model", default="smollm2", help="a pulled name, or a directory with --gguf")
    parser.add_argument("--gguf", type=Path, help="the checkpoint that the model was converted from")
    parser.add_argument("--threads", type=int, default=get_threads())
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.gguf is None:
        pull(args.model, kernels=kernels)
        args.gguf = sources_directory() / f"{PUBLISHED[args.model].gguf_sha256}.gguf"
    set_threads(args.threads)
    quantised = state_directory() / "peers" / f"{args.gguf.stem}.q8_0.gguf"
    quantised.parent.mkdir(parents=True, exist_ok=True)
    peer = Peer(args.python, args.gguf, quantised, args.threads)
    ours: list[float] = []
    theirs: list[float] = []
    with Engine(resolve_model(args.model), EngineConfig(strategy="full-tee")) as engine:
        engine.start()
        for turn in range(args.rounds + 1):
            pair = our_rate(engine, PROMPT, TOKENS), peer.rate(PROMPT, TOKENS)
            if turn:
                ours.append(pair[0])
                theirs.append(pair[1])
    peer.close()
    ratio = statistics.median(ours) / statistics.median(theirs)
    line = {
        "name": "full_tee.decode_over_llama_cpp", "value": ratio, "unit": "of its tokens/s", "bar": BAR, "met": ratio >= BAR,
        "roofline": None, "fraction": None,
        "full_tee_tokens_per_s": statistics.median(ours), "llama_cpp_tokens_per_s": statistics.median(theirs),
        "full_tee_range": [min(ours), max(ours)], "llama_cpp_range": [min(theirs), max(theirs)],
        "threads": args.threads, "rounds": args.rounds, "prompt_tokens": PROMPT, "decoded_tokens": TOKENS,
        **doctor.origin(),
        "load_average": os.getloadavg()[0],  # near the number of threads where nothing else ran
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **peer.about,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    print(
        f"{args.threads} threads: full-tee {statistics.median(ours):.1f} tokens/s, "
        f"llama.cpp {peer.about['llama_cpp']} (Q8_0) {statistics.median(theirs):.1f}: {ratio:.2f}, bar {BAR}"
    )
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
