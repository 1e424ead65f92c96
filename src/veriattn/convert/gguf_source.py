"""A GGUF file as a source: llama (and Mistral in llama form), qwen2, qwen3 and phi3 architectures."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from veriattn.convert.checkpoint import (
    F32,
    Arch,
    FrequencyFactors,
    RopeScaling,
    SourceConfig,
    SpecialTokens,
    TensorTable,
    TensorView,
    clamp_to_window,
    linear_scaling,
    sha256_file,
)
from veriattn.convert.gguf_file import GgufFile
from veriattn.convert.gguf_tokenizer import GgufTokenizer
from veriattn.convert.tokenizer_check import check_tokenizer_json
from veriattn.errors import ModelError

_ARCHITECTURES: dict[str, Arch] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
_ROPE_FREQS = "rope_freqs.weight"
_EXPERT_HINT = "dense models of the architectures llama, mistral, qwen2, qwen3 and phi3 are supported"
# Keys that change the function computed; each is refused unless it has the neutral value given here.
_NEUTRAL: dict[str, int | float] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
}


class GgufSource:
    """A checked GGUF checkpoint. `scratch` is a temporary directory that must live as long as the file is read.

    Raises: ModelError for anything damaged or not supported, by name.
    """

    def __init__(self, path: Path, *, scratch: TemporaryDirectory[str] | None = None) -> None:
        self.path = path
        self._scratch = scratch
        self._file = GgufFile(path)
        self._refuse()
        self._file.check_types()
        self._tokenizer = GgufTokenizer(self._file.metadata)
        self._config = self._read_config()
        ignored = {_ROPE_FREQS} if isinstance(self._config.rope_scaling, FrequencyFactors) else set()
        self._table = TensorTable(self._config, self._file, self._views(), ignored)

    @property
    def config(self) -> SourceConfig:
        return self._config

    @property
    def special(self) -> SpecialTokens:
        return self._tokenizer.special

    def tensor(self, name: str) -> F32:
        return self._table.tensor(name)

    def tensor_rows(self, name: str, start: int, stop: int) -> F32:
        return self._table.tensor_rows(name, start, stop)

    @cached_property
    def _digest(self) -> str:
        return sha256_file(self.path)

    def digest(self) -> str:
        """SHA-256 of the GGUF file, which is what its publisher lists."""
        return self._digest

    @cached_property
    def _tokenizer_json(self) -> str:
        text = self._tokenizer.json()
        check_tokenizer_json(text, self._config.vocab_size)
        return text

    def tokenizer_json(self) -> str:
        return self._tokenizer_json

    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template()

    def _refuse(self) -> None:
        metadata = self._file.metadata
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in _ARCHITECTURES:
            raise ModelError(f"GGUF architecture {arch!r} is not supported", hint=_EXPERT_HINT)
        self._arch = arch
        split = metadata.get("split.count", 0)
        if split not in (0, 1):
            raise ModelError(f"{self.path} is one part of a GGUF split in {split}", hint="merge the parts first")
        for key, neutral in _NEUTRAL.items():
            value = metadata.get(f"{arch}.{key}", neutral)
            if value != neutral:
                raise ModelError(f"GGUF sets {arch}.{key} = {value}, which is not supported", hint=_EXPERT_HINT)
        if metadata.get(f"{arch}.attention.causal") is False:
            raise ModelError("GGUF model has no causal mask, which is not supported")
        for name in self._file.tensors:
            if name.startswith("rope_factors_"):
                raise ModelError(f"GGUF has {name}: longrope scaling is not supported", hint=_EXPERT_HINT)

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._file.metadata.get(f"{self._arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"GGUF metadata: {self._arch}.{key} is {value!r}, must be one whole number for all layers")
        return value

    def _float(self, key: str, default: float | None = None) -> float:
        value = self._file.metadata.get(f"{self._arch}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"GGUF metadata: {self._arch}.{key} is {value!r}, must be a number")
        return float(value)

    def _read_config(self) -> SourceConfig:
        metadata, shapes = self._file.metadata, self._file.shapes()
        hidden, heads = self._int("embedding_length"), self._int("attention.head_count")
        if heads <= 0:
            raise ModelError(f"GGUF metadata: {heads} attention heads")
        head_dim = self._int("attention.key_length", hidden // heads)
        if self._int("attention.value_length", head_dim) != head_dim:
            raise ModelError("GGUF model has keys and values of different sizes, which is not supported")
        rotary_dim = self._int("rope.dimension_count", head_dim)
        if rotary_dim != head_dim and self._arch != "phi3":
            raise ModelError(f"GGUF {self._arch} model rotates {rotary_dim} of {head_dim} dimensions: not supported")
        embed = shapes.get("token_embd.weight")
        if embed is None or len(embed) != 2:
            raise ModelError("GGUF has no embedding matrix token_embd.weight")
        if len(self._tokenizer.tokens) > embed[0]:
            raise ModelError(f"GGUF lists {len(self._tokenizer.tokens)} tokens for an embedding of {embed[0]} rows")
        window_key = f"{self._arch}.attention.sliding_window"
        window = self._int("attention.sliding_window") if metadata.get(window_key) else None
        max_positions, notes = clamp_to_window(self._int("context_length"), window)
        # Not the name of the file: the same checkpoint gives the same digest wherever it lies.
        name = metadata.get("general.name", metadata.get("general.architecture", "gguf"))
        return SourceConfig(
            arch=_ARCHITECTURES[self._arch],
            hidden_size=hidden,
            num_layers=self._int("block_count"),
            num_heads=heads,
            num_kv_heads=self._int("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=self._int("feed_forward_length"),
            vocab_size=embed[0],
            max_positions=max_positions,
            rms_eps=self._float("attention.layer_norm_rms_epsilon"),
            rope_theta=self._float("rope.freq_base", 10000.0),
            rotary_dim=rotary_dim,
            rope_scaling=self._rope_scaling(rotary_dim),
            attention_bias=self._arch == "qwen2",
            qk_norm=self._arch == "qwen3",
            tie_embeddings="output.weight" not in shapes,
            sliding_window=window,
            bos_id=self._tokenizer.special.bos_id,
            eos_ids=self._tokenizer.special.eos_ids,
            name=str(name),
            notes=notes,
        )

    def _rope_scaling(self, rotary_dim: int) -> RopeScaling | None:
        kind = self._file.metadata.get(f"{self._arch}.rope.scaling.type", "none")
        explicit = _ROPE_FREQS in self._file.tensors
        if kind == "linear" and not explicit:
            return linear_scaling(self._float("rope.scaling.factor"), rotary_dim)
        if kind != "none":
            raise ModelError(f"GGUF rope scaling {kind!r} is not supported", hint=_EXPERT_HINT)
        if not explicit:
            return None
        factors = self._file.read_rows(_ROPE_FREQS, 0, 1).reshape(-1)
        return FrequencyFactors(tuple(float(value) for value in factors))

    def _views(self) -> dict[str, TensorView]:
        config = self._config
        fused = self._arch == "phi3"
        # llama.cpp's converter interleaves rotary pairs for this architecture only; the others keep their order.
        interleaved = config.head_dim if self._arch == "llama" else None
        output = "token_embd.weight" if config.tie_embeddings else "output.weight"
        top = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": output}
        shapes = config.tensor_shapes()
        views = {name: TensorView(stored, shapes[name]) for name, stored in top.items()}
        names = {
            "attn_norm": "attn_norm.weight",
            "mlp_norm": "ffn_norm.weight",
            "q": "attn_qkv.weight" if fused else "attn_q.weight",
            "k": "attn_qkv.weight" if fused else "attn_k.weight",
            "v": "attn_qkv.weight" if fused else "attn_v.weight",
            "o": "attn_output.weight",
            "gate": "ffn_up.weight" if fused else "ffn_gate.weight",
            "up": "ffn_up.weight",
            "down": "ffn_down.weight",
            "q_bias": "attn_q.bias",
            "k_bias": "attn_k.bias",
            "v_bias": "attn_v.bias",
            "q_norm": "attn_q_norm.weight",
            "k_norm": "attn_k_norm.weight",
        }
        q_size, kv_size = config.q_size, config.kv_size
        first_rows = {"k": q_size, "v": q_size + kv_size, "up": config.intermediate_size} if fused else {}
        for i in range(config.num_layers):
            for key, shape in config.layer_shapes().items():
                permuted = interleaved if key in ("q", "k") else None
                views[f"layers.{i}.{key}"] = TensorView(
                    f"blk.{i}.{names[key]}", shape, first_rows.get(key, 0), permuted
                )
        return views
