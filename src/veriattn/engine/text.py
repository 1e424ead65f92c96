"""Text to token ids and back: encoding, chat prompts, text as tokens arrive, stop strings."""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from veriattn.engine.chat import ChatTemplate, Message
from veriattn.errors import ModelError, UsageError

_DAMAGED = "fetch or convert the model again"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in set(printable)):
        table[chr(0x100 + n)] = b
    return table


_BYTE_OF_CHAR = _byte_of_char()


class TextCodec:
    """A model's tokenizer and chat template.

    Special tokens (`<|im_end|>` and the like) are recognised wherever their text stands in a prompt, as in
    transformers and vLLM: the template writes them as text. So text of a user's message can close its turn. A caller
    that passes on text of people whom it does not trust to play all roles must refuse or escape these strings itself
    (`special_texts`).

    Raises: ModelError for a tokenizer that does not load, exceeds the vocabulary or has a decoder not known here.
    """

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str | None,
        bos_id: int | None,
        eos_ids: Sequence[int],
        add_bos: bool,
        vocab_size: int,
    ) -> None:
        self._tokenizer = _load(tokenizer_json, vocab_size)
        self.bos_id, self.eos_ids, self.add_bos, self.vocab_size = bos_id, tuple(eos_ids), add_bos, vocab_size
        if add_bos and bos_id is None:
            raise ModelError("the model asks for a BOS token that it does not name", hint=_DAMAGED)
        description = json.loads(tokenizer_json)
        self._rule = _decoder_rule(description.get("decoder"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_texts = tuple(added[i].content for i in sorted(self._special_ids))
        self._template = None
        if chat_template is not None:
            bos = None if bos_id is None else self._tokenizer.id_to_token(bos_id)
            eos = self._tokenizer.id_to_token(self.eos_ids[0]) if self.eos_ids else None
            self._template = ChatTemplate(chat_template, bos, eos)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`, after BOS where the model wants one (`add_bos` overrides). Raises: UsageError."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("the text holds half of a surrogate pair, which is not Unicode text") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        with_bos = self.add_bos if add_bos is None else add_bos
        return [self.bos_id, *ids] if with_bos and self.bos_id is not None else ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a rendered conversation. The template writes BOS itself where the model wants one."""
        return self.encode(self.render_chat(messages), add_bos=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text that the model's chat template makes. Raises: UsageError, ModelError."""
        if self._template is None:
            raise UsageError("this model has no chat template", hint="use `--raw` or plain completions")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids at once, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for ids that are padding of the vocabulary."""
        text: str | None = self._tokenizer.id_to_token(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the middle of a text (special tokens: their names)."""
        token = self.token(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._special_ids else self._rule.token_bytes(token)

    def pieces(self) -> _Pieces:
        """State for decoding one stream of tokens."""
        return self._rule.pieces()

    def is_special(self, token_id: int) -> bool:
        """Whether this is a token such as end-of-text, which is no part of the text."""
        return token_id in self._special_ids


class IncrementalDecoder:
    """Text of a stream of tokens. All deltas and `finish()` together are `codec.decode` of all ids, exactly.

    Text is held back while it may still change: an unfinished UTF-8 sequence, or, for tokenizers with byte fallback, a
    run of byte tokens (whose text depends on where the run ends).
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._pieces = codec.pieces()

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        if self._codec.is_special(token_id):
            return ""
        token = self._codec.token(token_id)
        return "" if token is None else self._pieces.push(token)

    def finish(self) -> str:
        """What was held back; the decoder starts anew after it."""
        rest = self._pieces.finish()
        self._pieces = self._codec.pieces()
        return rest


class StopMatcher:
    """Cuts a stream of text before the first stop string, wherever the boundaries of its pieces lie.

    The first stop string to be complete wins; of those that end together, the longest. Text that may be the beginning
    of one is held back. Raises: UsageError for an empty stop string.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        if not all(self._stops):
            raise UsageError("a stop string is empty", hint="leave it out")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now. Empty once a stop string has matched."""
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(at + len(s), -len(s), s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end - len(self.matched)]
        held = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._begins_a_stop(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no more text comes; empty after a match."""
        rest, self._held = self._held, ""
        return rest

    def _begins_a_stop(self, tail: str) -> bool:
        return any(s.startswith(tail) for s in self._stops)


class _Rule(ABC):
    """How a tokenizer's decoder turns tokens into text."""

    @abstractmethod
    def pieces(self) -> _Pieces: ...

    @abstractmethod
    def token_bytes(self, token: str) -> bytes: ...


class _Pieces(ABC):
    """One stream's state; `push` and `finish` as in `IncrementalDecoder`."""

    @abstractmethod
    def push(self, token: str) -> str: ...

    @abstractmethod
    def finish(self) -> str: ...


class _ByteLevelRule(_Rule):
    """Characters stand for bytes; all bytes together are read as UTF-8, damage as U+FFFD."""

    def pieces(self) -> _Pieces:
        return _ByteLevelPieces(self)

    def token_bytes(self, token: str) -> bytes:
        try:
            return bytes([_BYTE_OF_CHAR[c] for c in token])
        except KeyError:
            # Added tokens are text already.
            return token.encode()


class _ByteLevelPieces(_Pieces):
    def __init__(self, rule: _ByteLevelRule) -> None:
        self._rule = rule
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        return self._utf8.decode(self._rule.token_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ReplaceRule(_Rule):
    """SentencePiece style: characters are replaced in each token, runs of byte tokens are read as UTF-8 where they are
    valid and as one U+FFFD per token where not, and up to `strip` copies of a character are cut from the beginning."""

    def __init__(self, replace: list[tuple[str, str]], byte_fallback: bool, strip: tuple[str, int]) -> None:
        self.replace, self.byte_fallback, self.strip = replace, byte_fallback, strip

    def pieces(self) -> _Pieces:
        return _ReplacePieces(self)

    def byte(self, token: str) -> int | None:
        match = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return None if match is None else int(match[1], 16)

    def text(self, token: str) -> str:
        for old, new in self.replace:
            token = token.replace(old, new)
        return token

    def token_bytes(self, token: str) -> bytes:
        byte = self.byte(token)
        return self.text(token).encode() if byte is None else bytes([byte])


class _ReplacePieces(_Pieces):
    def __init__(self, rule: _ReplaceRule) -> None:
        self._rule = rule
        self._run = bytearray()
        self._strip_char, self._to_strip = rule.strip

    def push(self, token: str) -> str:
        byte = self._rule.byte(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + self._rule.text(token))

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while text and self._to_strip:
            if not text.startswith(self._strip_char):
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        return text


class _MetaspaceRule(_Rule):
    """A marker stands for a space; the first token loses its markers where one was put before the text."""

    def __init__(self, marker: str, drop_first: bool) -> None:
        self.marker, self.drop_first = marker, drop_first

    def pieces(self) -> _Pieces:
        return _MetaspacePieces(self)

    def token_bytes(self, token: str) -> bytes:
        return token.replace(self.marker, " ").encode()


class _MetaspacePieces(_Pieces):
    def __init__(self, rule: _MetaspaceRule) -> None:
        self._rule = rule
        self._drop = rule.drop_first

    def push(self, token: str) -> str:
        drop, self._drop = self._drop, False
        return token.replace(self._rule.marker, "" if drop else " ")

    def finish(self) -> str:
        return ""


def _decoder_rule(description: Any) -> _Rule:
    """The rule of a tokenizer's "decoder" entry. Raises: ModelError for one that is not known here."""
    steps = description
    if isinstance(steps, dict):
        steps = steps.get("decoders") if steps.get("type") == "Sequence" else [steps]
    if isinstance(steps, list) and all(isinstance(s, dict) for s in steps):
        kinds = [s.get("type") for s in steps]
        if kinds == ["ByteLevel"]:
            return _ByteLevelRule()
        if kinds == ["Metaspace"]:
            return _MetaspaceRule(steps[0].get("replacement", "▁"), steps[0].get("prepend_scheme", "always") != "never")
        rule = _replace_rule(steps)
        if rule is not None:
            return rule
    kind = description.get("type") if isinstance(description, dict) else description
    raise ModelError(
        f"the tokenizer's decoder ({kind}) is not supported", hint="byte-level BPE and SentencePiece-style decoders are"
    )


def _replace_rule(steps: list[dict[str, Any]]) -> _ReplaceRule | None:
    """Replace*, ByteFallback?, Fuse, Strip? of the beginning; None for anything else."""
    rest = list(steps)
    replace = []
    while rest and rest[0].get("type") == "Replace":
        pattern, content = rest[0].get("pattern"), rest.pop(0).get("content")
        old = pattern.get("String") if isinstance(pattern, dict) else None
        if not isinstance(old, str) or not old or not isinstance(content, str):
            return None
        replace.append((old, content))
    byte_fallback = bool(rest) and rest[0].get("type") == "ByteFallback"
    rest = rest[1:] if byte_fallback else rest
    if not rest or rest.pop(0).get("type") != "Fuse":
        return None
    strip = ("", 0)
    if rest and rest[0].get("type") == "Strip" and rest[0].get("stop") == 0:
        content, start = rest[0].get("content"), rest.pop(0).get("start")
        if not (isinstance(content, str) and len(content) == 1 and isinstance(start, int) and start >= 0):
            return None
        strip = (content, start)
    return None if rest else _ReplaceRule(replace, byte_fallback, strip)


def _load(tokenizer_json: str, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the extension raises the bare class; nothing narrower exists
        if type(error) not in (Exception, ValueError):
            raise
        raise ModelError(f"the tokenizer does not load: {str(error)[:200]}", hint=_DAMAGED) from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise ModelError(
            f"the tokenizer's largest token id is {largest}, the model has {vocab_size} embeddings", hint=_DAMAGED
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
