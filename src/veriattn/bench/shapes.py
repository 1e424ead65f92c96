"""Models of real shapes with random weights: what a measurement of speed needs of a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from veriattn.errors import UsageError
from veriattn.spec.model import ModelConfig
from veriattn.spec.modelfile import ModelWriter

Array = npt.NDArray[Any]

_CHUNK = 1 << 24
_EMBEDDINGS = (np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32) / np.float32(64)).astype("<f2")


def _shape(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int, **more: Any
) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=inner, vocab_size=vocab, max_positions=more.pop("max_positions", 131072), rotary_dim=head_dim,
        rms_eps=1e-5, **more,
    )  # fmt: skip


#: Public configurations: Llama 3.2 3B, Llama 3.1 8B, Qwen3 14B, Phi-4, SmolLM2-135M; and one for tests.
SHAPES: dict[str, ModelConfig] = {
    "llama-3b": _shape(3072, 28, 24, 8, 128, 8192, 128256),
    "llama-8b": _shape(4096, 32, 32, 8, 128, 14336, 128256),
    "qwen-14b": _shape(5120, 40, 40, 8, 128, 17408, 151936, qk_norm=True),
    "phi-14b": _shape(5120, 40, 40, 10, 128, 17920, 100352),
    "smollm2": _shape(576, 30, 9, 3, 64, 1536, 49152, max_positions=16384),
    "tiny": _shape(64, 2, 4, 2, 16, 96, 320, max_positions=4096),
}


def shape(name: str, layers: int | None = None) -> ModelConfig:
    """A shape by name, with fewer layers if asked for. Raises: UsageError."""
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}", hint=f"one of {', '.join(SHAPES)}")
    full = SHAPES[name]
    if layers is None:
        return full
    if not 1 <= layers <= full.num_layers:
        raise UsageError(f"{name} has {full.num_layers} layers, {layers} were asked for")
    return dataclasses.replace(full, num_layers=layers)


def write_random_model(path: Path, config: ModelConfig) -> str:
    """Write a canonical model directory with random weights; returns its digest. The same shape gives the same digest.

    Scales keep activations near 1, as in a trained model; the time of no kernel depends on values.
    """
    writer = ModelWriter(path, config)
    for name, (dtype, size) in config.tensor_specs().items():
        writer.write(name, _tensor(name, dtype, size, config))
    return writer.finish(
        tokenizer_json=json.dumps(TOKENIZER),
        chat_template=None,
        generation={"bos_id": None, "eos_ids": [], "add_bos": False},
        source={"name": "random weights for measuring"},
        conversion={},
    )


def _tensor(name: str, dtype: str, size: tuple[int, ...], config: ModelConfig) -> Iterator[Array]:
    """Consecutive rows of a tensor. Integer generators and exact scaling only: no libm has a part in the bits."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    width = int(np.prod(size[1:], dtype=np.int64))
    rows = max(1, _CHUNK // width)
    for first in range(0, size[0], rows):
        part = (min(rows, size[0] - first), *size[1:])
        if dtype == "I8":
            # -127 for -128
            weights = _bytes(rng, part[0] * width).view(np.int8).reshape(part)
            yield np.maximum(weights, np.int8(-127), out=weights)
        elif name == "embed":
            # 8 random bits over 2^6: -2 .. 2, exact in binary16
            yield _EMBEDDINGS[_bytes(rng, part[0] * width).reshape(part)]
        else:
            yield _float_rows(name, part, first, rng, config)


def _bytes(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint8]:
    """Random bytes by words of 64 bits: drawing int8 from a range takes 20 times as long."""
    return rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64).astype("<u8", copy=False).view(np.uint8)[:count]


def _float_rows(name: str, part: tuple[int, ...], first: int, rng: np.random.Generator, config: ModelConfig) -> Array:
    if name.startswith("rope."):
        # Half-angle tangents in place of angles: no sine from a library. Low pairs turn fast, high ones slowly.
        position = np.arange(first, first + part[0], dtype=np.float64)[:, None] % 97 / 64 - 0.75
        turn = position * 2.0 ** -(np.arange(part[1]) // 4)
        table: Array = ((1 - turn**2 if name == "rope.cos" else 2 * turn) / (1 + turn**2)).astype(np.float32)
        return table
    spread = rng.integers(128, 385, part, dtype=np.int16).astype(np.float32) / np.float32(256)  # 0.5 .. 1.5
    if name.endswith("v_scale"):
        return spread * np.float32(4 / 127)
    if name.endswith(".scale"):
        width = config.linear_shapes()[name.removesuffix(".scale")][1]
        return spread * np.float32(1 / 73 / 2.0 ** (width.bit_length() // 2))
    return spread


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_MODEL: dict[str, Any] = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {"a": 0}, "merges": [],
}  # fmt: skip
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": _BYTE_LEVEL, "post_processor": None, "decoder": _BYTE_LEVEL, "model": _MODEL,
}  # fmt: skip
