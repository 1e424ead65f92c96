"""The float reference against transformers: small random models of every architecture in awkward shapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch.nn")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from veriattn.convert.float_reference import FloatChunk, FloatKVCache, FloatReference  # noqa: E402
from veriattn.convert.sources import open_source  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
BASE = {
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "vocab_size": 307,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
PHI3 = {"num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 64, "head_dim": 16, "sliding_window": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-tied-1kv": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-mha-odd-vocabulary": ("Llama", {"num_key_value_heads": 6, "vocab_size": 311}),
    "llama-llama3-scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 100}),
    "qwen2": ("Qwen2", {"hidden_size": 144, "head_dim": 24, "tie_word_embeddings": True}),
    "qwen2-1kv": ("Qwen2", {"hidden_size": 144, "head_dim": 24, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3-1kv": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 40, "tie_word_embeddings": True}),
    "phi3": ("Phi3", PHI3),
    "phi3-partial-rotary": ("Phi3", PHI3 | {"partial_rotary_factor": 0.75, "num_key_value_heads": 2}),
}


def write_tokenizer(directory: Path) -> None:
    vocab = {"<s>": 0, "</s>": 1, "a": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FloatReference]:
    family, changes = CASES[request.param]
    torch.manual_seed(20240607)
    config = getattr(transformers, f"{family}Config")(**(BASE | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 0.15)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size="60KB")
    write_tokenizer(directory)
    return model, FloatReference(open_source(directory))


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    spread = expected.max() - expected.min()
    assert spread > 1.0
    assert np.abs(got - expected).max() <= 1e-4 * spread


def test_logits_match_transformers(pair: tuple[Any, FloatReference]) -> None:
    model, reference = pair
    ids = np.random.default_rng(1).integers(0, reference.config.vocab_size, 97)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert_close(reference.logits(ids), expected)


def test_ragged_chunks_with_caches_match_transformers(pair: tuple[Any, FloatReference]) -> None:
    model, reference = pair
    rng = np.random.default_rng(2)
    sequences = [rng.integers(0, reference.config.vocab_size, length) for length in (61, 9)]
    caches = [FloatKVCache(reference.config) for _ in sequences]
    pieces: list[list[np.ndarray]] = [[], []]
    for cuts in (((0, 17), (0, 1)), ((17, 18), (1, 8)), ((18, 61), (8, 9))):
        chunks = [FloatChunk(ids[lo:hi], cache) for ids, cache, (lo, hi) in zip(sequences, caches, cuts, strict=True)]
        for piece, logits in zip(pieces, reference.logits_of(chunks), strict=True):
            piece.append(logits)
    for ids, piece in zip(sequences, pieces, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        assert_close(np.concatenate(piece), expected)


def test_streaming_gives_the_same_logits(pair: tuple[Any, FloatReference]) -> None:
    _, reference = pair
    ids = np.random.default_rng(3).integers(0, reference.config.vocab_size, 20)
    streamed = FloatReference(reference.source, stream=True).logits(ids)
    assert_close(streamed, reference.logits(ids))


def test_the_comparison_notices_a_wrong_rotary_base(pair: tuple[Any, FloatReference]) -> None:
    model, reference = pair
    ids = np.random.default_rng(4).integers(0, reference.config.vocab_size, 40)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    wrong = FloatReference(reference.source)
    wrong.config = dataclasses.replace(reference.config, rope_theta=reference.config.rope_theta * 1.05)
    with pytest.raises(AssertionError):
        assert_close(wrong.logits(ids), expected)
