"""Rebuild a Hugging Face `tokenizers` JSON from the tokenizer metadata of a GGUF file (byte-level BPE only)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from veriattn.convert.checkpoint import SpecialTokens
from veriattn.convert.gguf_file import Value
from veriattn.errors import ModelError

_HINT = "convert from the model's Hugging Face directory, which has its own tokenizer.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# One numeric character at a time (Qwen2) or up to three (Llama 3); the rest of the pattern is shared.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split_then_bytes(digits: str) -> dict[str, Any]:
    pattern = {"Regex": _SPLIT.format(digits=digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


@dataclass(frozen=True)
class _PreTokenizer:
    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _digits_then_bytes() -> dict[str, Any]:
    digits = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [digits, _byte_level(use_regex=True)]}


_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_byte_level(use_regex=True)),
    "smollm": _PreTokenizer(_digits_then_bytes()),
    "llama-bpe": _PreTokenizer(_split_then_bytes("{1,3}"), ignore_merges=True, add_bos=True),
    "dbrx": _PreTokenizer(_split_then_bytes("{1,3}")),
    "qwen2": _PreTokenizer(_split_then_bytes(""), normalizer={"type": "NFC"}),
}


def _strings(metadata: dict[str, Value], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise ModelError(f"GGUF metadata has no list {key}", hint=_HINT)
    if not all(isinstance(item, str) for item in value):
        raise ModelError(f"GGUF metadata {key} holds something other than strings")
    return [str(item) for item in value]


def _token_id(metadata: dict[str, Value], name: str, size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
        raise ModelError(f"GGUF metadata: {name} token id {value!r} is not one of the {size} tokens")
    return value


class GgufTokenizer:
    """The tokenizer of a GGUF file, in the terms of the `tokenizers` package.

    Raises: ModelError for SentencePiece and other models, for pre-tokenizers without an exact counterpart here, and
    for token lists that contradict themselves.
    """

    def __init__(self, metadata: dict[str, Value]) -> None:
        model = metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise ModelError(f"GGUF tokenizer model {model!r} is not supported; byte-level BPE (gpt2) is", hint=_HINT)
        pre = metadata.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
            names = ", ".join(_PRE_TOKENIZERS)
            raise ModelError(f"GGUF pre-tokenizer {pre!r} is not supported; these are: {names}", hint=_HINT)
        if metadata.get("tokenizer.ggml.add_space_prefix") is True:
            raise ModelError("GGUF tokenizer asks for a space prefix, which is not supported", hint=_HINT)
        self._rules = _PRE_TOKENIZERS[pre]
        self.tokens = _strings(metadata, "tokenizer.ggml.tokens")
        self._merges = [_merge(text) for text in _strings(metadata, "tokenizer.ggml.merges")]
        types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(self.tokens))
        if not isinstance(types, list) or len(types) != len(self.tokens):
            raise ModelError("GGUF metadata: token types do not match the tokens")
        if unknown := set(types) - {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}:
            raise ModelError(f"GGUF metadata: unknown token types {sorted(map(str, unknown))}")
        self._types = types
        self._chat_template = metadata.get("tokenizer.chat_template")
        self.special = self._special(metadata)

    def _special(self, metadata: dict[str, Value]) -> SpecialTokens:
        size = len(self.tokens)
        bos_id = _token_id(metadata, "bos", size)
        eos_id = _token_id(metadata, "eos", size)
        ends = [eos_id, _token_id(metadata, "eot", size), _token_id(metadata, "eom", size)]
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", self._rules.add_bos)
        if metadata.get("tokenizer.ggml.add_eos_token") is True:
            raise ModelError("GGUF tokenizer appends an end token to every text, which is not supported", hint=_HINT)
        if add_bos and bos_id is None:
            raise ModelError("GGUF tokenizer asks for a BOS token that it does not name")
        return SpecialTokens(
            bos=None if bos_id is None else self.tokens[bos_id],
            bos_id=bos_id,
            eos=None if eos_id is None else self.tokens[eos_id],
            eos_ids=tuple(sorted({token for token in ends if token is not None})),
            add_bos=bool(add_bos),
        )

    def chat_template(self) -> str | None:
        if self._chat_template is None:
            return None
        if not isinstance(self._chat_template, str):
            raise ModelError("GGUF metadata: the chat template is not a string")
        return self._chat_template

    def json(self) -> str:
        """The tokenizer as JSON; unused entries (padding of the vocabulary) are left out."""
        vocab: dict[str, int] = {}
        added: list[dict[str, Any]] = []
        for token_id, (text, kind) in enumerate(zip(self.tokens, self._types, strict=True)):
            if kind == _UNUSED:
                continue
            if text in vocab:
                raise ModelError(f"GGUF token list: ids {vocab[text]} and {token_id} are the same token")
            vocab[text] = token_id
            if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN):
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                added.append({"id": token_id, "content": text, **flags, "special": kind != _USER_DEFINED})
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": self._rules.ignore_merges,
            "vocab": vocab,
            "merges": self._merges,
        }
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": self._rules.normalizer,
            "pre_tokenizer": self._rules.pre_tokenizer,
            "post_processor": self._post_processor(),
            "decoder": _byte_level(use_regex=True),
            "model": model,
        }
        return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))

    def _post_processor(self) -> dict[str, Any] | None:
        if not self.special.add_bos:
            return None
        bos, bos_id = self.special.bos, self.special.bos_id
        special = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        return {
            "type": "TemplateProcessing",
            "single": [special, first],
            "pair": [special, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }


def _merge(text: str) -> list[str]:
    # A merge is two tokens around one space; the first token is never empty, so the search starts at 1.
    split = text.find(" ", 1)
    if split < 0 or split == len(text) - 1:
        raise ModelError(f"GGUF metadata: {text!r} is not a merge of two tokens")
    return [text[:split], text[split + 1 :]]
