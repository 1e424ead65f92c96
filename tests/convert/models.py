"""Small float models in memory, the same on every machine, with weights that have some structure.

Uniform noise alone is the easiest thing to quantise. Real models have outlier channels in the residual stream, norms
far from one and logits that prefer something; so do these.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tests.helpers import Bits, tiny_tokenizer_json

from veriattn.convert.checkpoint import F32, Llama3Scaling, SourceConfig, SpecialTokens

#: Odd shapes on purpose: head_dim other than hidden / heads, 1 and 3 KV heads, vocabularies that no tile divides.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "heads": 4, "kv_heads": 1, "head_dim": 24, "vocab": 307, "tied": True,
        "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 64), "rope_theta": 500000.0,
    },
    "mistral": {"heads": 6, "kv_heads": 3, "head_dim": 16, "hidden": 80, "inner": 112},
    "qwen2": {"heads": 3, "kv_heads": 3, "head_dim": 32, "vocab": 271, "attention_bias": True, "tied": True},
    "qwen3": {"heads": 2, "kv_heads": 1, "head_dim": 64, "hidden": 72, "qk_norm": True},
    "phi3": {"heads": 3, "kv_heads": 3, "head_dim": 32, "rotary_dim": 24, "inner": 90},
}  # fmt: skip


@dataclass
class MemorySource:
    """A `Source` over arrays. Tests change `tensors` before they convert it."""

    config: SourceConfig
    tensors: dict[str, F32]
    path: Path = Path("memory")
    special: SpecialTokens = field(default_factory=lambda: SpecialTokens(None, None, None, (2,), False))

    def tensor(self, name: str) -> F32:
        if name == "lm_head" and self.config.tie_embeddings:
            name = "embed"
        return self.tensors[name].copy()

    def tensor_rows(self, name: str, start: int, stop: int) -> F32:
        return self.tensor(name)[start:stop]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode() + self.tensors[name].tobytes())
        return digest.hexdigest()

    def tokenizer_json(self) -> str:
        return tiny_tokenizer_json(self.config.vocab_size)

    def chat_template(self) -> str | None:
        return None


def float_model(arch: str = "llama", seed: int = 0, **changes: Any) -> MemorySource:
    """A model of `arch` with the odd sizes of `SIZES`; `changes` override them."""
    s: dict[str, Any] = {
        "hidden": 64, "layers": 2, "inner": 96, "vocab": 265, "tied": False, "max_positions": 512,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "qk_norm": False,
    }  # fmt: skip
    s |= SIZES[arch] | changes
    config = SourceConfig(
        arch=arch,  # type: ignore[arg-type]
        hidden_size=s["hidden"],
        num_layers=s["layers"],
        num_heads=s["heads"],
        num_kv_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        intermediate_size=s["inner"],
        vocab_size=s["vocab"],
        max_positions=s["max_positions"],
        rms_eps=1e-5,
        rope_theta=s["rope_theta"],
        rotary_dim=s.get("rotary_dim", s["head_dim"]),
        rope_scaling=s["rope_scaling"],
        attention_bias=s["attention_bias"],
        qk_norm=s["qk_norm"],
        tie_embeddings=s["tied"],
        eos_ids=(2,),
        name=f"tiny-{arch}",
    )
    bits = Bits(f"float/{arch}/{seed}")
    tensors = {
        name: _tensor(bits, name, shape, config)
        for name, shape in config.tensor_shapes().items()
        if not (name == "lm_head" and config.tie_embeddings)
    }
    return MemorySource(config, tensors)


def bell(bits: Bits, *shape: int) -> np.ndarray[Any, Any]:
    """Roughly normal, variance 1, float64: six uniform numbers each."""
    return np.sqrt(0.5) * sum(bits.uniform(-1.0, 1.0, *shape).astype(np.float64) for _ in range(6))


def _tensor(bits: Bits, name: str, shape: tuple[int, ...], config: SourceConfig) -> F32:
    short = name.rsplit(".", maxsplit=1)[-1]
    if short.endswith("norm"):
        values = 1.0 + 0.3 * bell(bits, *shape)
        values[:: max(2, shape[0] // 3)] *= 3.0  # outlier channels
    elif short.endswith("bias"):
        values = 0.5 * bell(bits, *shape)
    else:
        gain = {"embed": np.sqrt(shape[1]), "lm_head": 2.0, "o": 0.7, "down": 0.7, "q": 1.5, "k": 1.5}.get(short, 1.0)
        if short == "embed" and config.tie_embeddings:
            gain = 2.0
        values = gain * bell(bits, *shape) / np.sqrt(shape[1])
        if short == "embed":
            values[:, 3] *= 6.0  # an outlier channel of the residual stream
    return values.astype(np.float32)


def random_windows(source: MemorySource, count: int, length: int, name: str = "windows") -> list[list[int]]:
    """Windows of random tokens."""
    bits = Bits(f"{name}/{source.config.name}")
    return [[int(t) for t in row] for row in bits.integers(0, source.config.vocab_size - 1, count, length)]


def text_of(count: int) -> str:
    """A calibration text of `count` tokens of the tiny tokenizer."""
    return "".join(chr(97 + int(c)) for c in Bits("text").integers(0, 25, count))
