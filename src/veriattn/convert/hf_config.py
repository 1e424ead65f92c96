"""Read a Hugging Face `config.json`: exactly the models whose function is known here, the rest refused by name."""

from __future__ import annotations

from typing import Any

from veriattn.convert.checkpoint import (
    Arch,
    Llama3Scaling,
    RopeScaling,
    SourceConfig,
    clamp_to_window,
    linear_scaling,
)
from veriattn.errors import ModelError

_CLASSES: dict[str, Arch] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}
_HINT = "supported are " + ", ".join(_CLASSES)
# Keys of other families that change the function computed; here they must be absent or have a value that does nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "mlp_bias": (None, False),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "is_causal": (None, True),
    "use_mrope": (None, False),
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_DEFAULT_MISTRAL_WINDOW = 4096


class _Fields:
    """Typed access to the keys of a configuration."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self._where = where

    def int(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int:
            raise ModelError(f"{self._where}: {key} is {value!r}, must be a whole number")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{self._where}: {key} is {value!r}, must be a number")
        try:
            return float(value)
        except OverflowError as error:
            raise ModelError(f"{self._where}: {key} is too large") from error

    def bool(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}: {key} is {value!r}, must be true or false")
        return value


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """An id, a list of ids or null, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"{what} is {value!r}, must be a token id or a list of them")
    return tuple(ids)


def parse_hf_config(values: dict[str, Any], *, name: str) -> SourceConfig:
    """The source configuration that a `config.json` describes; special token ids are those of this file alone.

    Raises: ModelError naming the key or class that is not supported.
    """
    fields = _Fields(values, "config.json")
    arch = _architecture(values)
    for key, allowed in _NEUTRAL.items():
        if values.get(key) not in allowed:
            raise ModelError(f"config.json sets {key} = {values[key]!r}, which is not supported", hint=_HINT)
    if (act := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelError(f"activation {act!r} is not supported; silu is")
    if fields.bool("attention_bias", False) and arch != "qwen2":
        raise ModelError(f"attention_bias of {arch} models has an output bias, which is not supported", hint=_HINT)
    hidden, heads = fields.int("hidden_size"), fields.int("num_attention_heads")
    head_dim = _head_dim(fields, arch, hidden, heads)
    rotary_dim = _rotary_dim(fields, arch, head_dim)
    theta, scaling = _rope(fields, rotary_dim)
    window = _sliding_window(fields, arch)
    max_positions, notes = clamp_to_window(fields.int("max_position_embeddings"), window)
    bos = token_ids(values.get("bos_token_id"), "bos_token_id")
    return SourceConfig(
        arch=arch,
        hidden_size=hidden,
        num_layers=fields.int("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.int("num_key_value_heads", heads if arch in ("llama", "phi3") else None),
        head_dim=head_dim,
        intermediate_size=fields.int("intermediate_size"),
        vocab_size=fields.int("vocab_size"),
        max_positions=max_positions,
        rms_eps=fields.float("rms_norm_eps"),
        rope_theta=theta,
        rotary_dim=rotary_dim,
        rope_scaling=scaling,
        attention_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        tie_embeddings=fields.bool("tie_word_embeddings", False),
        sliding_window=window,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(sorted(set(token_ids(values.get("eos_token_id"), "eos_token_id")))),
        name=name,
        notes=notes,
    )


def _architecture(values: dict[str, Any]) -> Arch:
    for key in ("quantization_config", "compression_config"):
        if (config := values.get(key)) is not None:
            method = config.get("quant_method", "unknown") if isinstance(config, dict) else config
            raise ModelError(
                f"the checkpoint is quantised ({method}), which is not supported",
                hint="convert from the original float checkpoint or from a GGUF",
            )
    classes = values.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in _CLASSES:
        raise ModelError(f"architecture {classes!r} is not supported", hint=_HINT)
    arch = _CLASSES[classes[0]]
    if values.get("model_type", arch) != arch:
        raise ModelError(f"model_type {values['model_type']!r} does not belong to {classes[0]}", hint=_HINT)
    return arch


def _head_dim(fields: _Fields, arch: Arch, hidden: int, heads: int) -> int:
    if fields.values.get("head_dim") is not None:
        return fields.int("head_dim")
    if arch == "qwen3":
        return 128  # the class's default, whatever the hidden size
    if heads <= 0 or hidden % heads:
        raise ModelError(f"hidden size {hidden} does not divide into {heads} heads and no head_dim is given")
    return hidden // heads


def _rope_values(fields: _Fields) -> dict[str, Any]:
    """`rope_parameters` (newer files) or `rope_scaling` (older ones); an empty dict where neither is set."""
    found = [fields.values[key] for key in ("rope_parameters", "rope_scaling") if fields.values.get(key) is not None]
    if any(not isinstance(value, dict) or any(isinstance(v, dict) for v in value.values()) for value in found):
        raise ModelError("rope parameters per layer type are not supported", hint=_HINT)
    if len(found) == 2 and found[0] != found[1]:
        raise ModelError("config.json has rope_parameters and rope_scaling that differ")
    return dict(found[0]) if found else {}


def _same(fields: _Fields, rope: _Fields, key: str, default: float) -> float:
    """A number that may stand at the top level, among the rope parameters, or (equal) in both places."""
    outer, inner = fields.float(key, default), rope.float(key, default)
    if fields.values.get(key) is None or outer == inner:
        return inner
    if rope.values.get(key) is None:
        return outer
    raise ModelError(f"config.json gives two values for {key}: {outer} and {inner}")


def _rotary_dim(fields: _Fields, arch: Arch, head_dim: int) -> int:
    rope = _Fields(_rope_values(fields), "config.json, rope parameters")
    factor = _same(fields, rope, "partial_rotary_factor", 1.0)
    if factor != 1.0 and arch != "phi3":
        raise ModelError(f"partial_rotary_factor {factor} is not supported for {arch}")
    if not 0 < factor <= 1:
        raise ModelError(f"partial_rotary_factor {factor} is out of range")
    return int(head_dim * factor)


def _rope(fields: _Fields, rotary_dim: int) -> tuple[float, RopeScaling | None]:
    rope = _Fields(_rope_values(fields), "config.json, rope parameters")
    theta = _same(fields, rope, "rope_theta", 10000.0)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, linear_scaling(rope.float("factor"), rotary_dim)
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=rope.float("factor"),
            low_freq_factor=rope.float("low_freq_factor"),
            high_freq_factor=rope.float("high_freq_factor"),
            original_max_positions=rope.int("original_max_position_embeddings"),
        )
        return theta, scaling
    raise ModelError(f"rope type {kind!r} is not supported", hint="default, linear and llama3 are")


def _sliding_window(fields: _Fields, arch: Arch) -> int | None:
    types = fields.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or not set(map(str, types)) <= _LAYER_TYPES):
        raise ModelError(f"layer types {types!r} are not supported", hint="full and sliding attention are")
    slides = types is not None and "sliding_attention" in types
    if arch in ("qwen2", "qwen3") and not (slides or fields.bool("use_sliding_window", False)):
        return None
    if "sliding_window" not in fields.values and arch == "mistral":
        return _DEFAULT_MISTRAL_WINDOW
    if fields.values.get("sliding_window") is None:
        if slides:
            raise ModelError("config.json has sliding layers but no sliding_window")
        return None
    return fields.int("sliding_window")
