"""Tiny canonical models, the same on every machine: no libm and no generator of NumPy has a part in their bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from veriattn.spec import reference
from veriattn.spec.forward import Batch, BatchEntry, forward
from veriattn.spec.local import LocalOperations
from veriattn.spec.model import ModelConfig, ModelTensors
from veriattn.spec.modelfile import ModelDirectory, ModelWriter, TensorCollector

Array = np.ndarray[Any, Any]

#: Every switch and odd size that a canonical model can have.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "k_center": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "num_heads": 2, "num_kv_heads": 1},
    "phi3": {"rotary_dim": 6, "num_kv_heads": 4, "k_center": True},
    "odd": {
        "hidden_size": 24, "head_dim": 12, "num_heads": 3, "num_kv_heads": 1, "intermediate_size": 20, "vocab_size": 37,
        "rotary_dim": 12,
    },
    "odd_everything": {
        "hidden_size": 24, "head_dim": 12, "num_heads": 3, "num_kv_heads": 3, "intermediate_size": 21, "vocab_size": 37,
        "rotary_dim": 6, "qkv_bias": True, "qk_norm": True, "k_center": True, "num_layers": 3,
    },
}  # fmt: skip

BOS, EOS, TURN_START, TURN_END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, EOS, TURN_START, TURN_END)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Bits:
    """A stream of pseudo-random numbers: SHAKE-256 of a name. Integer arithmetic and exact scaling only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0

    def _words(self, shape: tuple[int, ...]) -> Array:
        self._count += 1
        n = int(np.prod(shape, dtype=np.int64))
        raw = hashlib.shake_256(f"{self._name}/{self._count}".encode()).digest(4 * n)
        return np.frombuffer(raw, "<u4").reshape(shape)

    def integers(self, low: int, high: int, *shape: int) -> Array:
        """Uniform in low..high (both included), as int64; the modulus' bias is no matter here."""
        return self._words(shape).astype(np.int64) % (high - low + 1) + low

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        """float32, one rounding of a binary64 value."""
        return (low + self._words(shape).astype(np.float64) / 2.0**32 * (high - low)).astype(np.float32)


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of two layers that runs in a millisecond; `changes` override its sizes and switches."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96,
        "vocab_size": 300, "max_positions": 1024, "rms_eps": 1e-5,
    }  # fmt: skip
    sizes |= changes
    sizes.setdefault("rotary_dim", sizes["head_dim"])
    return ModelConfig(**sizes)


def tiny_tensors(config: ModelConfig, seed: int = 0) -> dict[str, Array]:
    """Random tensors whose activations stay near 1, in file order."""
    tensors: dict[str, Array] = {}
    for name, (dtype, shape) in config.tensor_specs().items():
        bits = Bits(f"{seed}/{name}")
        if name == "embed":
            tensors[name] = bits.uniform(-2, 2, *shape).astype(np.float16)
        elif name == "rope.cos":
            # Half-angle tangents in place of angles: no sine from a library. Low pairs turn fast, high ones slowly.
            turn = bits.uniform(-1.5, 1.5, *shape).astype(np.float64) * 2.0 ** -np.arange(shape[1])
            tensors[name] = ((1 - turn**2) / (1 + turn**2)).astype(np.float32)
            tensors["rope.sin"] = (2 * turn / (1 + turn**2)).astype(np.float32)
        elif name == "rope.sin":
            continue
        elif dtype == "I8":
            tensors[name] = bits.integers(-127, 127, *shape).astype(np.int8)
        elif name.endswith("v_scale"):
            tensors[name] = bits.uniform(3 / 127, 5 / 127, *shape)
        elif name.endswith(".scale"):
            width = config.linear_shapes()[name.removesuffix(".scale")][1]
            gain = 4.0 if name.startswith("lm_head") else 1.0
            tensors[name] = bits.uniform(0.5, 1.5, *shape) * np.float32(gain / 73 / 2.0 ** (width.bit_length() // 2))
        else:
            tensors[name] = bits.uniform(0.5, 1.5, *shape) * (bits.integers(0, 1, *shape) * 2 - 1).astype(np.float32)
    return {name: tensors[name] for name in config.tensor_specs()}


def byte_level_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE, those of readable bytes first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    char = {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}
    first = [*b"abcdefghijklmnopqrstuvwxyz", 0x20, 0x0A]
    return [char[b] for b in [*first, *(b for b in range(256) if b not in set(first))]]


def tiny_tokenizer_json(vocab_size: int) -> str:
    """Byte-level BPE without merges: special tokens are ids 0 to 3, then as many bytes as fit (space and a-z first)."""
    vocab = {t: i for i, t in enumerate([*SPECIAL_TOKENS, *byte_level_alphabet()][:vocab_size])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": t, "special": True, **flags} for i, t in enumerate(SPECIAL_TOKENS)],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [],
            },
        }
    )


def make_model(
    path: Path,
    *,
    seed: int = 0,
    tensors: dict[str, Array] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    tokenizer_json: str | None = None,
    eos_ids: tuple[int, ...] = (1, 3),
    add_bos: bool = False,
    **changes: Any,
) -> str:
    """Write a tiny model directory; returns its digest. The same arguments give the same digest."""
    config = tiny_config(**changes)
    writer = ModelWriter(path, config)
    for name, values in (tensors or tiny_tensors(config, seed)).items():
        writer.write(name, values)
    return writer.finish(
        tokenizer_json=tokenizer_json or tiny_tokenizer_json(config.vocab_size),
        chat_template=chat_template,
        generation={"bos_id": 0, "eos_ids": list(eos_ids), "add_bos": add_bos},
        source={"name": "tiny", "sha256": hashlib.sha256(str(seed).encode()).hexdigest()},
        conversion={},
    )


def public_tensors(config: ModelConfig, tensors: dict[str, Array]) -> ModelTensors:
    """What the forward pass itself reads, out of all tensors."""
    collector = TensorCollector(config)
    for name, values in tensors.items():
        collector.add(name, 0, values)
    return collector.tensors()


class LocalModel:
    """A tiny model in memory that runs its own linears and attention."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Array], kernels: ModuleType = reference) -> None:
        self.config, self.kernels = config, kernels
        self.tensors = public_tensors(config, tensors)
        packed = {n: kernels.pack(tensors[f"{n}.weight"]) for n in config.linear_shapes()}
        self.ops = LocalOperations(config, packed.__getitem__, kernels)

    @classmethod
    def tiny(cls, *, seed: int = 0, kernels: ModuleType = reference, **changes: Any) -> LocalModel:
        config = tiny_config(**changes)
        return cls(config, tiny_tensors(config, seed), kernels)

    @classmethod
    def open(cls, path: Path, kernels: ModuleType = reference) -> LocalModel:
        """Read a model directory, checking every hash."""
        directory = ModelDirectory(path)
        chunks: dict[str, list[Array]] = {}
        for name, _, chunk in directory.stream():
            chunks.setdefault(name, []).append(chunk)
        return cls(directory.config, {n: np.concatenate(c) for n, c in chunks.items()}, kernels)

    def step(self, *entries: BatchEntry) -> Array:
        """Logits of one step, shape (rows asked for, vocab)."""
        return forward(self.tensors, Batch(entries), self.ops, self.kernels)

    def run(self, token_ids: list[int], chunks: list[int] | None = None, seq_id: int = 0) -> Array:
        """Logits of every position of a fresh sequence, cut into steps of the given lengths."""
        rows, at = [], 0
        for n in chunks or [len(token_ids)]:
            rows.append(self.step(BatchEntry(seq_id, at, tuple(token_ids[at : at + n]), "all")))
            at += n
        self.ops.free(seq_id)
        return np.concatenate(rows)

    def greedy(self, prompt_ids: list[int], count: int, seq_id: int = 0) -> list[int]:
        """The most likely continuation, ties to the lowest id."""
        ids, start = list(prompt_ids), 0
        for _ in range(count):
            row = self.step(BatchEntry(seq_id, start, tuple(ids[start:])))[0]
            start = len(ids)
            ids.append(int(np.argmax(row)))
        self.ops.free(seq_id)
        return ids[len(prompt_ids) :]
