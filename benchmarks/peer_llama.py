"""llama.cpp's side of `make bench-peers`; runs in .venv-peers, which has llama-cpp-python and nothing of ours.

peer_llama.py SOURCE.gguf QUANTISED.gguf THREADS: makes the Q8_0 file where it is missing, prints one line about itself, then
answers each line `PROMPT TOKENS` of standard input with the seconds that decoding took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import llama_cpp  # type: ignore[import-not-found, unused-ignore]


def quantise(source: Path, target: Path) -> None:
    """The same weights as Q8_0, as llama.cpp makes them."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    part = target.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params) != 0:
        raise SystemExit("llama.cpp could not quantise the model")
    part.rename(target)


def main() -> None:
    source, target, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if not target.exists():
        quantise(source, target)
    model = llama_cpp.Llama(str(target), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"llama_cpp": llama_cpp.__version__, "peer_bytes": target.stat().st_size}), flush=True)
    for line in sys.stdin:
        prompt, tokens = map(int, line.split())
        model.reset()
        model.eval([1000 + i for i in range(prompt)])
        start = time.perf_counter()
        for i in range(tokens):
            # What comes next does not matter for the time, but the logits are read, as a sampler would.
            model.eval([2000 + i])
            model._ctx.get_logits_ith(-1)
        print(json.dumps({"decode_s": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
