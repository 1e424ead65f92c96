"""Bars of whole runs: verified decoding and prompts beside unverified ones, the verifier's memory for an 8B shape."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from veriattn.bench.kernels import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, Result
from veriattn.engine.engine import Engine, EngineConfig, Request
from veriattn.engine.strategies import Strategy
from veriattn.spec.model import ModelConfig
from veriattn.verifier.checks import VerifiedCache
from veriattn.verifier.keys import KeySet
from veriattn.verifier.model import KEY_SETS_PER_PASS

_DTYPE_BYTES = {"F16": 2, "F32": 4, "I8": 1}
_DECODED = 48


def _config(layers: int, positions: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=HIDDEN, num_layers=layers, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        intermediate_size=INTERMEDIATE, vocab_size=128_256, max_positions=positions, rotary_dim=HEAD_DIM, rms_eps=1e-5,
    )  # fmt: skip


def _verifier_and_model_bytes(layers: int, keys: int) -> tuple[int, int]:
    """What the verifier holds, and int8 weights plus keys and values with their scales."""
    config = _config(layers, keys)
    sizes = {"I8": 0, "other": 0}
    for dtype, shape in config.tensor_specs().values():
        count = 1
        for n in shape:
            count *= n
        sizes["I8" if dtype == "I8" else "other"] += count * _DTYPE_BYTES[dtype]
    # Of the second key set, the spare, and of the cache only sizes matter: one of each is made.
    secrets = KeySet(config)
    cache = VerifiedCache(config, secrets, False)
    for layer in range(layers):
        cache.layer(layer).extend(0, keys)
    verifier = sizes["other"] + KEY_SETS_PER_PASS * secrets.nbytes + cache.nbytes
    secrets.destroy()
    kv_state = keys * layers * KV_HEADS * 2 * (HEAD_DIM + _DTYPE_BYTES["F32"])
    return verifier, sizes["I8"] + kv_state


def verifier_memory(layers: int = 32, keys: int = 8192) -> Result:
    """Bytes of the verifier's tensors, key sets and cache over int8 weights plus KV state, for an 8B-shaped model.

    Sizes grow by the same amount with every layer, so models of one and of two layers are made and the rest is added up.
    """
    one, two = _verifier_and_model_bytes(1, keys), _verifier_and_model_bytes(2, keys)
    verifier, model = (a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return {
        "name": f"verifier_memory.8b.{keys // 1024}k", "value": verifier / model, "unit": "of weights + KV state",
        "bar": 0.25, "met": verifier / model <= 0.25, "roofline": None, "fraction": None,
    }  # fmt: skip


def _decode_s(engine: Engine, salt: int) -> float:
    """Seconds per token after a short prompt."""
    request = engine.submit(Request(tuple(50 + salt + i for i in range(16)), max_tokens=_DECODED + 1, ignore_eos=True))
    while not engine.states[request].output_ids:
        engine.step()
    start = time.perf_counter()
    engine.run_all()
    seconds = (time.perf_counter() - start) / _DECODED
    engine.forget(request)
    return seconds


def _prefill_s(engine: Engine, salt: int) -> float:
    """Seconds until the first token of a prompt of 1,024."""
    ids = tuple((i * 7919 + salt) % 20_000 + 50 for i in range(1024))
    start = time.perf_counter()
    request = engine.submit(Request(ids, max_tokens=1, ignore_eos=True))
    engine.run_all()
    seconds = time.perf_counter() - start
    engine.forget(request)
    return seconds


def whole_runs(model: Path, rounds: int = 7) -> list[Result]:
    """Decoding and prompts of a model, prover and verifier on this machine; the strategies take turns, medians count."""
    strategies: tuple[Strategy, ...] = ("run-ahead", "dangerous-unverified", "full-tee")
    decode: dict[str, list[float]] = {s: [] for s in strategies}
    prefill: dict[str, list[float]] = {s: [] for s in strategies}
    engines = {s: Engine(model, EngineConfig(strategy=s)) for s in strategies}
    try:
        for turn in range(rounds + 1):
            for s, engine in engines.items():
                timed = _decode_s(engine, turn), _prefill_s(engine, turn)
                if turn:
                    decode[s].append(timed[0])
                    prefill[s].append(timed[1])
    finally:
        for engine in engines.values():
            engine.close()
    rate = {s: 1 / statistics.median(t) for s, t in decode.items()}
    prompt = {s: 1024 / statistics.median(t) for s, t in prefill.items()}
    base: Strategy = "dangerous-unverified"

    def line(name: str, value: float, unit: str, bar: float | None, roofline: float | None) -> Result:
        return {
            "name": f"model.{name}", "value": value, "unit": unit, "bar": bar, "met": None if bar is None else value >= bar,
            "roofline": roofline, "fraction": None if roofline is None else value / roofline,
        }  # fmt: skip

    return [
        line("decode.verified", rate["run-ahead"], "tokens/s", 40.0, rate[base]),
        line("decode.unverified", rate[base], "tokens/s", None, None),
        line("decode.full_tee", rate["full-tee"], "tokens/s", None, None),
        line("decode.ratio", rate["run-ahead"] / rate[base], "verified/unverified", 0.85, None),
        line("prefill_1024.verified", prompt["run-ahead"], "tokens/s", None, prompt[base]),
        line("prefill_1024.unverified", prompt[base], "tokens/s", None, None),
        line("prefill_1024.ratio", prompt["run-ahead"] / prompt[base], "verified/unverified", 0.5, None),
    ]
