"""Acceptance of verified generation on SmolLM2: quality, strategies, digest, speed, killed provers. `make accept`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.generation import measure

from veriattn.convert.pull import PUBLISHED
from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import STRATEGIES, Strategy
from veriattn.errors import ProverUnavailable
from veriattn.home import sources_directory
from veriattn.spec.sampler import SamplingParams

pytestmark = pytest.mark.accept

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("Why is the sky blue?", "Write a function that adds two numbers.", "Name three rivers of Europe.")
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=100, seed=11)


def veriattn(*arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "veriattn", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_quality(smollm2: Path, eval_text: Path) -> None:
    q = veriattn("eval", "-m", str(smollm2), "--text", str(eval_text), "--max-tokens", "16384", "--window", "1024")
    print(f"\nquality: {q['tokens']} tokens, ratio {q['ppl_ratio']:.4f}, KL {q['kl']:.5f}, top-1 {q['top1']:.4f}")
    assert q["tokens"] == 16384
    assert q["ppl_ratio"] <= 1.008
    assert q["kl"] <= 0.0075
    assert q["top1"] >= 0.948


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "seeded"])
def test_strategies_agree(smollm2: Path, params: SamplingParams) -> None:
    answers = set()
    for strategy in STRATEGIES:
        for chunk in (16, 512):
            with Engine(smollm2, EngineConfig(strategy=strategy, prefill_chunk=chunk)) as engine:
                prompts = [tuple(engine.codec.encode_chat([{"role": "user", "content": p}])) for p in PROMPTS]
                requests = [Request(p, params, max_tokens=32) for p in (*prompts, prompts[0])]
                together = [tuple(s.output_ids) for s in engine.generate(requests)]
                alone = [tuple(engine.generate([r])[0].output_ids) for r in requests]
            answers |= {tuple(together), tuple(alone)}
    assert len(answers) == 1


@pytest.mark.parametrize("core", ["Haswell", "Prescott"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_digest_on_other_machines(smollm2: Path, tmp_path: Path, core: str, threads: str) -> None:
    entry = PUBLISHED["smollm2"]
    source = sources_directory() / f"{entry.gguf_sha256}.gguf"
    got = veriattn(
        "convert", str(source), "-o", str(tmp_path / "m"), "--threads", threads,
        OPENBLAS_CORETYPE=core, OPENBLAS_NUM_THREADS=threads,
    )  # fmt: skip
    assert got["model_digest"] == entry.model_digest


def test_speed(smollm2: Path) -> None:
    speed = measure(smollm2, "run-ahead", prompt=512, output=32)
    print(f"\nspeed: prefill {speed.prefill_tokens_per_s:.1f}, decode {speed.decode_tokens_per_s:.1f} tokens/s")
    assert speed.decode_tokens_per_s >= 5
    assert speed.prefill_tokens_per_s >= 100


@pytest.mark.parametrize("retries", [0, 1])
def test_killed_provers(smollm2: Path, retries: int) -> None:
    """SIGKILL at 25 random moments of the work each: a clean error, or the same tokens from a fresh prover; nothing stays
    behind."""
    rng = random.Random(retries)
    strategy: Strategy = "run-ahead"
    with Engine(smollm2, EngineConfig(strategy=strategy)) as engine:
        request = Request(tuple(engine.codec.encode_chat([{"role": "user", "content": PROMPTS[0]}])), max_tokens=16)
        engine.start()
        started = time.monotonic()
        expected = engine.generate([request])[0].output_ids
        took_s = time.monotonic() - started
    clean = retried = 0
    for _ in range(25):
        with Engine(smollm2, EngineConfig(strategy=strategy, retries=retries)) as engine:
            engine.start()
            pid = engine.report().prover_pid
            assert pid is not None
            killer = threading.Timer(rng.uniform(0, took_s), os.kill, (pid, signal.SIGKILL))
            i = engine.submit(request)
            killer.start()
            try:
                engine.run_all()
            except ProverUnavailable:
                clean += 1
            killer.join()
            retried += engine.restarts
            released = engine.states[i].output_ids
            assert released == expected[: len(released)]
            assert engine.states[i].finish_reason is not None or retries == 0
        assert_gone(pid)
    print(f"\nkilled: 25 times with {retries} retries: {clean} clean errors, {retried} fresh provers")
    assert clean + retried > 0


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} is still there")
    links = [os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.is_symlink() and p.exists()]
    assert not any("memfd:veriattn" in link for link in links)
