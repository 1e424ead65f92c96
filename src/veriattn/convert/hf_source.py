"""A Hugging Face directory (config, tokenizer, safetensors) as a source."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from veriattn.convert.checkpoint import (
    F32,
    SourceConfig,
    SpecialTokens,
    TensorTable,
    TensorView,
    sha256_file,
)
from veriattn.convert.hf_config import parse_hf_config, token_ids
from veriattn.convert.safetensors_file import SafetensorsStore, load_json
from veriattn.convert.tokenizer_check import check_tokenizer_json
from veriattn.errors import ModelError

_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPARE_BYTES = 64 << 20


class HfSource:
    """A checked Hugging Face checkpoint.

    Raises: ModelError for anything missing, damaged or not supported, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "adapter_config.json").exists():
            raise ModelError(f"{path} is an adapter, not a whole model", hint="merge it into its base model first")
        values = load_json(path / "config.json")
        # Not the name of the directory: the same checkpoint gives the same digest wherever it lies.
        config = parse_hf_config(values, name=str(values.get("_name_or_path") or values.get("model_type")))
        self._tokenizer_config = self._optional("tokenizer_config.json")
        self._text = self._read_tokenizer()
        self._tokenizer = check_tokenizer_json(self._text, config.vocab_size)
        self._special = self._special_tokens(config)
        self._config = dataclasses.replace(config, bos_id=self._special.bos_id, eos_ids=self._special.eos_ids)
        self._store = SafetensorsStore(path)
        self._table = TensorTable(self._config, self._store, self._views(), self._ignored())

    @property
    def config(self) -> SourceConfig:
        return self._config

    @property
    def special(self) -> SpecialTokens:
        return self._special

    def tensor(self, name: str) -> F32:
        return self._table.tensor(name)

    def tensor_rows(self, name: str, start: int, stop: int) -> F32:
        return self._table.tensor_rows(name, start, stop)

    @cached_property
    def _digest(self) -> str:
        texts = [self.path / name for name in _TEXT_FILES if (self.path / name).exists()]
        digest = hashlib.sha256()
        for file in sorted({*texts, *self._store.files}):
            digest.update(f"{sha256_file(file)}  {file.name}\n".encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """SHA-256 of the list that `sha256sum` prints for the files used, in order of their names."""
        return self._digest

    def tokenizer_json(self) -> str:
        return self._text

    def chat_template(self) -> str | None:
        path = self.path / "chat_template.jinja"
        if path.exists():
            return self._read_text(path)
        for values in (self._optional("chat_template.json"), self._tokenizer_config):
            template = values.get("chat_template")
            if isinstance(template, list):
                template = _named_template(template)
            if template is None:
                continue
            if not isinstance(template, str):
                raise ModelError("the chat template is not a string")
            return template
        return None

    def _read_text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not UTF-8") from error
        except OSError as error:
            hint = "a Hugging Face directory holds config.json, tokenizer.json and safetensors"
            raise ModelError(f"cannot read {path}: {error.strerror}", hint=hint) from error

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return load_json(path) if path.exists() else {}

    def _read_tokenizer(self) -> str:
        path = self.path / "tokenizer.json"
        if not path.exists():
            raise ModelError(
                f"{self.path} has no tokenizer.json",
                hint="save it with transformers' AutoTokenizer(..., use_fast=True).save_pretrained",
            )
        return self._read_text(path)

    def _token(self, key: str) -> str | None:
        value = self._tokenizer_config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise ModelError(f"tokenizer_config.json: {key} is {value!r}, must be a string")
        return value

    def _special_tokens(self, config: SourceConfig) -> SpecialTokens:
        generation = self._optional("generation_config.json")
        ends = set(token_ids(generation.get("eos_token_id"), "generation_config.json: eos_token_id"))
        ends |= set(config.eos_ids)
        eos, bos = self._token("eos_token"), self._token("bos_token")
        eos_id, bos_id = self._id_of(eos), self._id_of(bos)
        if eos_id is not None:
            ends.add(eos_id)
        if eos is None and ends:
            eos = self._tokenizer.id_to_token(min(ends))
        # A tokenizer without BOS is the last word, even where the model's configuration still names an id.
        if bos_id is None and "bos_token" not in self._tokenizer_config and config.bos_id is not None:
            bos_id, bos = config.bos_id, self._tokenizer.id_to_token(config.bos_id)
        return SpecialTokens(
            bos=bos, bos_id=bos_id, eos=eos, eos_ids=tuple(sorted(ends)), add_bos=self._adds_bos(bos_id)
        )

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ModelError(f"tokenizer_config.json names the token {token!r}, which tokenizer.json does not have")
        return int(token_id)

    def _adds_bos(self, bos_id: int | None) -> bool:
        if self._tokenizer_config.get("add_eos_token") is True:
            raise ModelError("the tokenizer appends an end token to every text, which is not supported")
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        if full not in (plain, [bos_id, *plain]):
            raise ModelError("the tokenizer surrounds text with special tokens other than BOS, which is not supported")
        adds = self._tokenizer_config.get("add_bos_token")
        if isinstance(adds, bool):
            if adds and bos_id is None:
                raise ModelError("tokenizer_config.json asks for a BOS token that it does not name")
            return adds
        return full != plain

    def _ignored(self) -> set[str]:
        """Stored tensors that carry no information of their own: rotary tables, and a tied head equal to its table."""
        stored = self._store.shapes()
        ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if self._config.tie_embeddings and "lm_head.weight" in stored:
            self._check_tied("model.embed_tokens.weight", "lm_head.weight")
            ignored.add("lm_head.weight")
        return ignored

    def _check_tied(self, table: str, head: str) -> None:
        shapes = self._store.shapes()
        if table not in shapes or len(shapes[head]) != 2 or shapes[table] != shapes[head]:
            raise ModelError(f"tensor {head} is tied to {table} but has another shape")
        rows, width = shapes[head]
        step = max(1, _COMPARE_BYTES // max(1, 4 * width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first, second = self._store.read_rows(table, start, stop), self._store.read_rows(head, start, stop)
            if not np.array_equal(first, second, equal_nan=True):
                raise ModelError(
                    f"config.json ties the embeddings, yet {head} differs from {table}",
                    hint="set tie_word_embeddings to what the model was trained with",
                )

    def _views(self) -> dict[str, TensorView]:
        config = self._config
        fused = config.arch == "phi3"
        table = "model.embed_tokens.weight"
        top = {
            "embed": table,
            "final_norm": "model.norm.weight",
            "lm_head": table if config.tie_embeddings else "lm_head.weight",
        }
        shapes = config.tensor_shapes()
        views = {name: TensorView(stored, shapes[name]) for name, stored in top.items()}
        names = {
            "attn_norm": "input_layernorm.weight",
            "mlp_norm": "post_attention_layernorm.weight",
            "q": "self_attn.qkv_proj.weight" if fused else "self_attn.q_proj.weight",
            "k": "self_attn.qkv_proj.weight" if fused else "self_attn.k_proj.weight",
            "v": "self_attn.qkv_proj.weight" if fused else "self_attn.v_proj.weight",
            "o": "self_attn.o_proj.weight",
            "gate": "mlp.gate_up_proj.weight" if fused else "mlp.gate_proj.weight",
            "up": "mlp.gate_up_proj.weight" if fused else "mlp.up_proj.weight",
            "down": "mlp.down_proj.weight",
            "q_bias": "self_attn.q_proj.bias",
            "k_bias": "self_attn.k_proj.bias",
            "v_bias": "self_attn.v_proj.bias",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
        }
        q_size, kv_size = config.q_size, config.kv_size
        first_rows = {"k": q_size, "v": q_size + kv_size, "up": config.intermediate_size} if fused else {}
        for i in range(config.num_layers):
            for key, shape in config.layer_shapes().items():
                stored = f"model.layers.{i}.{names[key]}"
                views[f"layers.{i}.{key}"] = TensorView(stored, shape, first_rows.get(key, 0))
        return views


def _named_template(templates: list[Any]) -> str | None:
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
            return template if isinstance(template, str) else None
    raise ModelError("tokenizer_config.json has chat templates, but none named default")
