"""Requests as OpenAI's clients send them: strict about types, tolerant of unknown fields, frank about what is not there.

A field that would change the answer and that this server does not implement is refused, unless it is set to what it does
anyway. Everything else unknown is ignored, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Semantic fields of OpenAI and vLLM that are not implemented -> values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "allowed_token_ids": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "documents": ([],),
    "prompt_embeds": (),
}

Fraction = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Text = Annotated[str, Field(max_length=1 << 22)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Extension(BaseModel):
    """Fields of this server's own, under `veriattn`. events: each chunk of a stream says when and how it was checked.
    lie: with --demo, a claim of the prover is altered on the way."""

    model_config = ConfigDict(strict=True, extra="forbid")
    events: bool = False
    lie: bool = False


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with token counts; `continuous_usage_stats` as in vLLM is not offered."""

    include_usage: bool | None = None


class GenerationRequest(_Strict):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=500)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Fraction, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Fraction, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Fraction, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Fraction, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[Fraction, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Fraction, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Fraction, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    veriattn: Extension | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> GenerationRequest:
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and value is not None and not _harmless(value, _UNSUPPORTED[name]):
                raise ValueError(f"'{name}' is not supported by this server")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in stops if s)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def _harmless(value: Any, allowed: tuple[Any, ...]) -> bool:
    # 0 == False in Python, but not to a client.
    return any(type(value) is type(a) and value == a for a in allowed)


class ContentPart(_Strict):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One message. Tool calls and results are refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]
    name: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _refuse_tools(self) -> ChatMessage:
        extra = self.model_extra or {}
        for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
            if extra.get(name):
                raise ValueError(f"'{name}' in a message is not supported by this server")
        return self

    def for_template(self) -> dict[str, Any]:
        """As the chat template sees it; the newer role `developer` is what templates call `system`."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(p.text for p in parts)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message | ({"name": self.name} if self.name else {})


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _logprobs_belong_together(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs' to be true")
        return self


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt`: text, token ids, or several of either."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
