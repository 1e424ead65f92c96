"""Architecture of a canonical model and the tensors that both sides of a session hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from veriattn.errors import ModelError
from veriattn.spec.constants import MAX_IN_FEATURES, MAX_KEYS
from veriattn.spec.reference import F32, I8, I32


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a canonical decoder. All lengths count elements; positions count tokens."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rotary_dim: int
    rms_eps: float
    qkv_bias: bool = False
    qk_norm: bool = False
    k_center: bool = False

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ModelError(f"model configuration: {what}", hint="the manifest is damaged or not a veriattn model")

        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int":
                need(type(value) is int and 0 < value < 2**31, f"{f.name} must be a positive integer")
            elif f.type == "bool":
                need(type(value) is bool, f"{f.name} must be true or false")
        need(type(self.rms_eps) is float and 2.0**-60 <= self.rms_eps <= 0.1, "rms_eps out of range")
        need(self.num_heads % self.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads")
        need(self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim, "rotary_dim must be even, at most head_dim")
        need(self.head_dim <= 256, "head_dim above 256")
        need(self.max_positions <= MAX_KEYS, f"more than {MAX_KEYS} positions")
        need(self.num_layers <= 1024, "more than 1024 layers")
        for n in (self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim):
            need(n <= MAX_IN_FEATURES, f"a linear with more than {MAX_IN_FEATURES} inputs")

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        return self.num_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear of the model in the order of the forward pass: name -> (out features, in features)."""
        shapes: dict[str, tuple[int, int]] = {}
        for i in range(self.num_layers):
            shapes[f"layers.{i}.qkv"] = (self.qkv_size, self.hidden_size)
            shapes[f"layers.{i}.o"] = (self.hidden_size, self.attention_size)
            shapes[f"layers.{i}.gate_up"] = (2 * self.intermediate_size, self.hidden_size)
            shapes[f"layers.{i}.down"] = (self.hidden_size, self.intermediate_size)
        shapes["lm_head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def tensor_specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor of the model in file order: name -> (safetensors dtype, shape)."""
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            "embed": ("F16", (self.vocab_size, self.hidden_size)),
            "rope.cos": ("F32", (self.max_positions, self.rotary_dim // 2)),
            "rope.sin": ("F32", (self.max_positions, self.rotary_dim // 2)),
        }
        for name, (out, inp) in self.linear_shapes().items():
            specs[f"{name}.weight"] = ("I8", (out, inp))
            specs[f"{name}.scale"] = ("F32", (out,))
            if name.endswith(".qkv"):
                layer = name[: -len(".qkv")]
                specs[f"{layer}.v_scale"] = ("F32", (self.num_kv_heads,))
                if self.qkv_bias:
                    specs[f"{layer}.qkv.bias"] = ("F32", (out,))
                if self.k_center:
                    specs[f"{layer}.k_center"] = ("F32", (self.num_kv_heads, self.head_dim))
                if self.qk_norm:
                    specs[f"{layer}.q_norm"] = ("F32", (self.head_dim,))
                    specs[f"{layer}.k_norm"] = ("F32", (self.head_dim,))
        return specs

    def to_json(self) -> dict[str, Any]:
        """The manifest's `config`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> ModelConfig:
        """Raises: ModelError on missing, unknown or ill-typed fields."""
        if not isinstance(data, dict):
            raise ModelError("model configuration is not an object")
        known = {f.name for f in dataclasses.fields(cls)}
        if set(data) != known:
            odd = sorted(set(data) ^ known)
            raise ModelError(f"model configuration: missing or unknown fields: {', '.join(odd)}")
        return cls(**data)


@dataclass(frozen=True)
class LayerTensors:
    """Everything of a layer but its weight matrices."""

    qkv_scale: F32
    o_scale: F32
    gate_up_scale: F32
    down_scale: F32
    v_scale: F32
    qkv_bias: F32 | None = None
    k_center: F32 | None = None
    q_norm: F32 | None = None
    k_norm: F32 | None = None


@dataclass(frozen=True)
class ModelTensors:
    """The public tensors that the forward pass itself reads; the weight matrices belong to whoever runs the linears."""

    config: ModelConfig
    embed_f16: np.ndarray[Any, np.dtype[np.float16]]
    rope_cos: F32
    rope_sin: F32
    layers: tuple[LayerTensors, ...]
    lm_head_scale: F32
    eps: np.float32 = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", np.float32(self.config.rms_eps))


Weights = dict[str, I8]
__all__ = ["I32", "LayerTensors", "ModelConfig", "ModelTensors", "Weights"]
