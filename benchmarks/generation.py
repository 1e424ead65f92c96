"""Prefill and decode speed of every strategy on one model, the strategies beside each other in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import Strategy


@dataclass(frozen=True)
class Speed:
    """Medians over the repetitions, in tokens per second over all sequences; `spread` is the slowest decode over the median."""

    strategy: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    repetitions: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    spread: float
    verify_cpu_s: float
    from_prover_bytes: int

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def prompt_ids(count: int, vocab_size: int, salt: int = 0) -> tuple[int, ...]:
    """Token ids that are spread over the vocabulary; what they mean does not change the work."""
    return tuple((i * 7919 + salt * 104729) % (vocab_size - 100) + 50 for i in range(count))


def measure(
    model: Path, strategy: Strategy, *, batch: int = 1, prompt: int = 512, output: int = 32, repetitions: int = 3
) -> Speed:
    """Prefill `batch` prompts of `prompt` tokens, decode `output` tokens each; the first round warms up and is not counted."""
    prefill, decode = [], []
    with Engine(model, EngineConfig(strategy=strategy)) as engine:
        vocab = engine.model.manifest.config.vocab_size
        for repetition in range(repetitions + 1):
            requests = [
                Request(prompt_ids(prompt, vocab, repetition * batch + i), max_tokens=output, ignore_eos=True)
                for i in range(batch)
            ]
            engine.start()
            before = engine.report()
            first, last = _run(engine, requests)
            if repetition:
                prefill.append(batch * prompt / first)
                # The token that ends the prefill is the first of each answer.
                decode.append(batch * (output - 1) / last)
        after = engine.report()
    return Speed(
        strategy=strategy,
        batch=batch,
        prompt_tokens=prompt,
        output_tokens=output,
        repetitions=repetitions,
        prefill_tokens_per_s=statistics.median(prefill),
        decode_tokens_per_s=statistics.median(decode),
        spread=min(decode) / statistics.median(decode),
        verify_cpu_s=after.verify_cpu_s - before.verify_cpu_s,
        from_prover_bytes=after.bytes_from_prover - before.bytes_from_prover,
    )


def _run(engine: Engine, requests: Sequence[Request]) -> tuple[float, float]:
    """Seconds until every sequence has its first token, and from there to the end."""
    began = time.perf_counter()
    ids = [engine.submit(request) for request in requests]
    while any(not engine.states[i].output_ids for i in ids):
        engine.step()
    filled = time.perf_counter()
    engine.run_all()
    done = time.perf_counter()
    for i in ids:
        engine.forget(i)
    return filled - began, done - filled
