"""Tiny float checkpoints, written without the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]


def byte_level_tokens() -> list[str]:
    """Special tokens, the 256 byte tokens and the results of `MERGES`."""
    return [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


@dataclass
class Tiny:
    """A random model: sizes, and float32 tensors by canonical name (rotate-half order, fused parts apart)."""

    arch: str
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 96
    vocab: int = 265
    tied: bool = False
    seed: int = 0
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "attn_norm": (self.hidden,),
            "mlp_norm": (self.hidden,),
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.inner, self.hidden),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }
        if self.arch == "qwen2":
            layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
        if self.arch == "qwen3":
            layer |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        shapes = {"embed": (self.vocab, self.hidden), "final_norm": (self.hidden,)}
        if not self.tied:
            shapes["lm_head"] = (self.vocab, self.hidden)
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        self.tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}

    def hf_config(self) -> dict[str, Any]:
        return {
            "architectures": [f"{CLASSES[self.arch]}ForCausalLM"],
            "model_type": self.arch,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.inner,
            "vocab_size": self.vocab,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def hf_tensors(self) -> dict[str, np.ndarray]:
        top = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
        names = {
            "attn_norm": "input_layernorm.weight",
            "mlp_norm": "post_attention_layernorm.weight",
            "gate": "mlp.gate_proj.weight",
            "up": "mlp.up_proj.weight",
            "down": "mlp.down_proj.weight",
            **{key: f"self_attn.{key}_proj.weight" for key in "qkvo"},
            **{f"{key}_bias": f"self_attn.{key}_proj.bias" for key in "qkv"},
            **{f"{key}_norm": f"self_attn.{key}_norm.weight" for key in "qk"},
        }
        out: dict[str, np.ndarray] = {}
        for name, values in self.tensors.items():
            if name in top:
                out[top[name]] = values
                continue
            _, i, key = name.split(".")
            out[f"model.layers.{i}.{names[key]}"] = values
        if self.arch == "phi3":
            for i in range(self.layers):
                at = f"model.layers.{i}."
                qkv = [out.pop(f"{at}self_attn.{key}_proj.weight") for key in "qkv"]
                out[f"{at}self_attn.qkv_proj.weight"] = np.concatenate(qkv)
                mlp = [out.pop(f"{at}mlp.{key}_proj.weight") for key in ("gate", "up")]
                out[f"{at}mlp.gate_up_proj.weight"] = np.concatenate(mlp)
        return out

    def gguf_tensors(self) -> dict[str, np.ndarray]:
        top = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight"}
        names = {
            "attn_norm": "attn_norm.weight",
            "mlp_norm": "ffn_norm.weight",
            "o": "attn_output.weight",
            **{key: f"attn_{key}.weight" for key in "qkv"},
            **{key: f"ffn_{key}.weight" for key in ("gate", "up", "down")},
            **{f"{key}_bias": f"attn_{key}.bias" for key in "qkv"},
            **{f"{key}_norm": f"attn_{key}_norm.weight" for key in "qk"},
        }
        out: dict[str, np.ndarray] = {}
        for name, values in self.tensors.items():
            if name in top:
                out[top[name]] = values
                continue
            _, i, key = name.split(".")
            if self.arch == "llama" and key in ("q", "k"):
                out[f"blk.{i}.{names[key]}"] = llama_cpp_permute(values, self.heads if key == "q" else self.kv_heads)
            else:
                out[f"blk.{i}.{names[key]}"] = values
        if self.arch == "phi3":
            for i in range(self.layers):
                qkv = [out.pop(f"blk.{i}.attn_{key}.weight") for key in "qkv"]
                out[f"blk.{i}.attn_qkv.weight"] = np.concatenate(qkv)
                mlp = [out.pop(f"blk.{i}.ffn_{key}.weight") for key in ("gate", "up")]
                out[f"blk.{i}.ffn_up.weight"] = np.concatenate(mlp)
        return out


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: within a head, rows j and j + d/2 become neighbours."""
    d = weights.shape[0] // heads
    order = [h * d + half * d // 2 + j for h in range(heads) for j in range(d // 2) for half in (0, 1)]
    return weights[order]


def tokenizer_json() -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(byte_level_tokens())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIALS)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ") for merge in MERGES]},
    }


@dataclass
class HfFiles:
    """The content of a Hugging Face directory; tests change it before `write`."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer: dict[str, Any] = field(default_factory=tokenizer_json)
    tokenizer_config: dict[str, Any] = field(
        default_factory=lambda: {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>", "special": True},
            "chat_template": "{{ messages[0].content }}",
        }
    )
    dtype: str = "F32"
    shards: int = 1

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for name, values in (
            ("config.json", self.config),
            ("tokenizer.json", self.tokenizer),
            ("tokenizer_config.json", self.tokenizer_config),
        ):
            (directory / name).write_text(json.dumps(values))
        names = list(self.tensors)
        weight_map = {}
        for shard in range(self.shards):
            file = "model.safetensors" if self.shards == 1 else f"model-{shard + 1:05}-of-{self.shards:05}.safetensors"
            part = {name: self.tensors[name] for name in names[shard :: self.shards]}
            weight_map |= dict.fromkeys(part, file)
            write_safetensors(directory / file, part, self.dtype)
        if self.shards > 1:
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    if dtype == "F8_E4M3":
        return bytes(values.size)
    return np.ascontiguousarray(values).astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """The format by hand: the library's writer takes no bfloat16 from NumPy."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        blobs.append(encode(values, dtype))
        end = offset + len(blobs[-1])
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


@dataclass
class GgufParts:
    """The content of a GGUF file; tests change it before `write`. A value of None in `keys` leaves the key out."""

    arch: str
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray]
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(str(path), self.arch)
        for key, value in self.keys.items():
            if value is None:
                continue
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, values in self.tensors.items():
            if name in self.raw:
                continue
            if values.ndim == 1 or self.qtype == gguf.GGMLQuantizationType.F32:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, quantize(values, self.qtype), raw_dtype=self.qtype)
        for name, (data, qtype) in self.raw.items():
            writer.add_tensor(name, data, raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def make_hf() -> Callable[..., HfFiles]:
    def make(arch: str = "llama", **sizes: Any) -> HfFiles:
        tiny = Tiny(arch, **sizes)
        return HfFiles(tiny.hf_config(), tiny.hf_tensors())

    return make


@pytest.fixture
def make_gguf() -> Callable[..., GgufParts]:
    def make(arch: str = "llama", **sizes: Any) -> GgufParts:
        tiny = Tiny(arch, **sizes)
        tokens = byte_level_tokens()
        keys = {
            "block_count": tiny.layers,
            "context_length": 128,
            "embedding_length": tiny.hidden,
            "feed_forward_length": tiny.inner,
            "attention.head_count": tiny.heads,
            "attention.head_count_kv": tiny.kv_heads,
            "attention.key_length": tiny.head_dim,
            "attention.value_length": tiny.head_dim,
            "rope.dimension_count": tiny.head_dim,
            "rope.freq_base": 10000.0,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        tokenizer = {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": tokens,
            "token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
            "merges": MERGES,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "add_bos_token": False,
        }
        all_keys = {f"{arch}.{key}": value for key, value in keys.items()}
        all_keys |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
        all_keys["tokenizer.chat_template"] = "{{ messages[0].content }}"
        return GgufParts(arch, all_keys, tiny.gguf_tensors())

    return make


@pytest.fixture
def make_tiny() -> type[Tiny]:
    return Tiny
