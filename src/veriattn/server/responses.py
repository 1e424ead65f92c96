"""OpenAI's response objects, whole and in chunks."""

from __future__ import annotations

import json
import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from veriattn.engine.engine import TokenOutput
from veriattn.engine.text import TextCodec

Kind = Literal["chat", "completion"]
_LEAST_LOGPROB = -9999.0


def dump(value: object) -> bytes:
    """UTF-8 JSON without spaces. Half surrogates, which only a client's own words could bring in, become '?'."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


@dataclass
class ChoiceState:
    """What has come of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class ResponseBuilder:
    """Objects of one response. `codec` spells tokens for logprobs."""

    def __init__(
        self, kind: Kind, model: str, codec: TextCodec, choices: int, fingerprint: str, logprobs: bool
    ) -> None:
        self.kind, self._model, self._codec, self._fingerprint = kind, model, codec, fingerprint
        self._logprobs = logprobs
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.choices = [ChoiceState() for _ in range(choices)]

    # -- state -------------------------------------------------------------------------------------------------

    def take(self, index: int, output: TokenOutput) -> list[dict[str, Any]]:
        """Record a token; returns its logprob entries (one, or none for the token that ends the text)."""
        state = self.choices[index]
        entries: list[dict[str, Any]] = []
        if output.token_id is not None:
            state.token_ids.append(output.token_id)
            if output.logprob is not None and output.token_id not in self._codec.eos_ids:
                entries = [self._entry(output)]
                state.entries += entries
                state.offsets.append(len(state.text))
        state.text += output.text
        state.finish_reason = output.finish_reason
        return entries

    @property
    def finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.choices)

    @property
    def completion_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.choices)

    def usage(self, prompt_tokens: int) -> dict[str, int]:
        done = self.completion_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": done, "total_tokens": prompt_tokens + done}

    # -- logprobs ----------------------------------------------------------------------------------------------

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._codec.token_bytes(token_id)
        value = logprob if math.isfinite(logprob) else _LEAST_LOGPROB
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    def _entry(self, output: TokenOutput) -> dict[str, Any]:
        top = [self._token(i, p) for i, p in output.top_logprobs]
        return {**self._token(output.token_id or 0, output.logprob or 0.0), "top_logprobs": top}

    def _logprobs_of(self, entries: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self.kind == "chat":
            return {"content": entries, "refusal": None}
        return {
            "tokens": [e["token"] for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": [{t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in entries],
            "text_offset": offsets,
        }

    # -- objects -----------------------------------------------------------------------------------------------

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def whole(self, prompt_tokens: int) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = []
        for index, c in enumerate(self.choices):
            choice: dict[str, Any] = {"index": index}
            if self.kind == "chat":
                choice["message"] = {"role": "assistant", "content": c.text, "refusal": None}
            else:
                choice["text"] = c.text
            choice["logprobs"] = self._logprobs_of(c.entries, c.offsets)
            choice["finish_reason"] = c.finish_reason
            choices.append(choice)
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage(prompt_tokens)}

    def chunk(
        self,
        index: int | None,
        *,
        text: str | None = None,
        first: bool = False,
        entries: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
        usage: dict[str, int] | None = None,
        with_usage: bool = False,
    ) -> dict[str, Any]:
        """One object of a stream. index None: no choices, as in the last chunk with usage."""
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        choices: list[dict[str, Any]] = []
        if index is not None:
            offsets = self.choices[index].offsets
            logprobs = (
                self._logprobs_of(entries or [], offsets[len(offsets) - len(entries or []) :]) if entries else None
            )
            choice: dict[str, Any] = {"index": index}
            if self.kind == "chat":
                choice["delta"] = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
            else:
                choice["text"] = text or ""
            choices = [{**choice, "logprobs": logprobs, "finish_reason": finish_reason}]
        chunk = {**self._head(kind), "choices": choices}
        if with_usage:
            chunk["usage"] = usage
        return chunk


def sse(value: object) -> bytes:
    """One event of a stream."""
    return b"data: " + dump(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
