"""The float reference against a second, naive forward pass in float64: one token, one head, one key at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veriattn.convert.float_reference import FloatChunk, FloatKVCache, FloatReference, causal_attention, silu
from veriattn.convert.sources import Source, open_source
from veriattn.errors import UsageError

ARCHS = ["llama", "mistral", "qwen2", "qwen3", "phi3"]


def naive_logits(source: Source, ids: list[int]) -> np.ndarray:
    c = source.config
    weights = {name: source.tensor(name).astype(np.float64) for name in c.tensor_shapes()}
    inv_freq = c.inv_freq()

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / math.sqrt(sum(x * x) / x.size + c.rms_eps) * weight

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        out, half = x.copy(), c.rotary_dim // 2
        for j in range(half):
            cos, sin = math.cos(position * inv_freq[j]), math.sin(position * inv_freq[j])
            out[j] = x[j] * cos - x[j + half] * sin
            out[j + half] = x[j + half] * cos + x[j] * sin
        return out

    keys: dict[tuple[int, int], list[np.ndarray]] = {}
    values: dict[tuple[int, int], list[np.ndarray]] = {}
    logits = []
    for position, token in enumerate(ids):
        x = weights["embed"][token]
        for i in range(c.num_layers):
            w = {key: weights[f"layers.{i}.{key}"] for key in c.layer_shapes()}
            h = norm(x, w["attn_norm"])
            q, k, v = ((w[n] @ h + w.get(f"{n}_bias", 0.0)).reshape(-1, c.head_dim) for n in "qkv")
            if c.qk_norm:
                q = np.stack([norm(row, w["q_norm"]) for row in q])
                k = np.stack([norm(row, w["k_norm"]) for row in k])
            for g in range(c.num_kv_heads):
                keys.setdefault((i, g), []).append(rotate(k[g], position))
                values.setdefault((i, g), []).append(v[g])
            attended = []
            for head in range(c.num_heads):
                g = head // (c.num_heads // c.num_kv_heads)
                scores = [rotate(q[head], position) @ key / math.sqrt(c.head_dim) for key in keys[i, g]]
                weights_ = np.exp(np.array(scores) - max(scores))
                attended.append(weights_ @ np.array(values[i, g]) / weights_.sum())
            x = x + w["o"] @ np.concatenate(attended)
            h = norm(x, w["mlp_norm"])
            gate = w["gate"] @ h
            x = x + w["down"] @ (gate / (1 + np.exp(-gate)) * (w["up"] @ h))
        logits.append(weights["lm_head"] @ norm(x, weights["final_norm"]))
    return np.array(logits)


@pytest.fixture(params=ARCHS)
def source(request: pytest.FixtureRequest, make_hf: Any, tmp_path: Path) -> Source:
    files = make_hf(request.param, tied=request.param == "qwen3")
    if request.param == "phi3":
        files.config["partial_rotary_factor"] = 0.75
    if request.param == "mistral":
        files.config["rope_scaling"] = {"rope_type": "linear", "factor": 3.0}
    return open_source(files.write(tmp_path))


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


def test_logits_match_the_naive_forward(source: Source) -> None:
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, 21).tolist()
    expected = naive_logits(source, ids)
    assert_close(FloatReference(source).logits(ids), expected)
    assert_close(FloatReference(source, stream=True).logits(ids), expected)


def test_chunks_and_batches_match_whole_sequences(source: Source) -> None:
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, source.config.vocab_size, length) for length in (90, 33, 1)]
    reference = FloatReference(source)
    caches = [FloatKVCache(source.config) for _ in sequences]
    got: list[list[np.ndarray]] = [[] for _ in sequences]
    for start in range(0, 90, 7):
        live = [i for i, ids in enumerate(sequences) if start < ids.size]
        chunks = [FloatChunk(sequences[i][start : start + 7], caches[i]) for i in live]
        for i, logits in zip(live, reference.logits_of(chunks), strict=True):
            got[i].append(logits)
    for pieces, whole in zip(got, reference.window_logits(sequences), strict=True):
        assert_close(np.concatenate(pieces), whole)


def test_attention_blocks_of_queries() -> None:
    """More queries than one block holds, behind a prefix: the mask is row t sees the keys 0 .. prefix + t."""
    rng = np.random.default_rng(2)
    tokens, total, d = 600, 650, 8
    q = rng.normal(size=(tokens, 3, d)).astype(np.float32)
    k, v = (rng.normal(size=(1, total, d)).astype(np.float32) for _ in range(2))
    got = causal_attention(q, k, v)
    for t in (0, 1, 255, 256, 511, 512, 599):
        scores = q[t].astype(np.float64) @ k[0, : total - tokens + t + 1].T.astype(np.float64) / math.sqrt(d)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = p @ v[0, : total - tokens + t + 1] / p.sum(axis=1, keepdims=True)
        assert np.abs(got[t] - expected).max() < 1e-5


def test_silu_does_not_overflow() -> None:
    x = np.array([-1e30, -100.0, -1.0, 0.0, 1.0, 100.0, 1e30], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        y = silu(x)
    assert y[3] == 0 and y[5] == 100 and y[6] == np.float32(1e30) and abs(y[1]) < 1e-40
    assert abs(float(y[4]) - 1 / (1 + math.exp(-1))) < 1e-7


def test_misuse_is_named(source: Source) -> None:
    reference = FloatReference(source)
    cache = FloatKVCache(source.config)
    for ids, message in (
        ([], "no tokens"),
        ([[1, 2]], "one sequence"),
        ([1] * 129, "context of 128"),
        ([265], "vocab"),
    ):
        with pytest.raises(UsageError, match=message):
            reference.logits(ids)
    with pytest.raises(UsageError, match="share a cache"):
        reference.hidden([FloatChunk(np.array([1]), cache), FloatChunk(np.array([2]), cache)])
