"""From an HTTP request to the engine's requests: prompts, limits, sampling parameters."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from veriattn.engine.engine import Engine, Request
from veriattn.engine.text import TextCodec
from veriattn.errors import ModelError, UsageError
from veriattn.server.config import LimitSettings
from veriattn.server.errors import ApiError, from_veriattn
from veriattn.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from veriattn.spec.sampler import TEMPERATURE_MIN, SamplingParams


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs of the engine; read once, so that no other thread touches it later."""

    codec: TextCodec
    vocab_size: int
    max_positions: int
    kv_tokens: int
    chat: bool

    @classmethod
    def of(cls, engine: Engine) -> ModelFacts:
        config = engine.model.manifest.config
        return cls(
            engine.codec,
            config.vocab_size,
            config.max_positions,
            engine.config.kv_tokens,
            engine.codec.has_chat_template,
        )


@dataclass(frozen=True)
class Plan:
    """The engine's requests, one for each choice in the order of the response's `index`, and what they share."""

    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
    params: SamplingParams
    max_tokens: tuple[int, ...]
    choices_per_prompt: int

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def reserved_tokens(self) -> int:
        """The most cache entries that all choices together can come to need."""
        return sum(len(r.prompt_ids) + r.max_tokens for r in self.requests)


def plan_chat(body: ChatCompletionRequest, facts: ModelFacts, limits: LimitSettings) -> Plan:
    """May take long for long prompts; not for the event loop. Raises: ApiError."""
    if not facts.chat:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "chat_not_supported")
    try:
        ids = facts.codec.encode_chat([m.for_template() for m in body.messages])
    except UsageError as e:
        raise ApiError(400, e.message, "invalid_value", param="messages") from None
    except ModelError as e:
        raise ApiError(
            400, f"these messages cannot be rendered: {e.message}", "invalid_value", param="messages"
        ) from None
    top = (body.top_logprobs or 0) if body.logprobs else None
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return _plan(body, [tuple(ids)], wanted, top, facts, limits)


def plan_completion(body: CompletionRequest, facts: ModelFacts, limits: LimitSettings) -> Plan:
    """May take long for long prompts; not for the event loop. Raises: ApiError."""
    prompts: list[Any] = [body.prompt]
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        prompts = list(body.prompt)
    try:
        encoded = [tuple(facts.codec.encode(p)) if isinstance(p, str) else tuple(p) for p in prompts]
    except UsageError as e:
        raise ApiError(400, e.message, "invalid_value", param="prompt") from None
    # OpenAI's documented default of plain completions.
    wanted = 16 if body.max_tokens is None else body.max_tokens
    return _plan(body, encoded, wanted, body.logprobs, facts, limits)


def _plan(
    body: GenerationRequest,
    prompts: list[tuple[int, ...]],
    wanted: int | None,
    logprobs: int | None,
    facts: ModelFacts,
    limits: LimitSettings,
) -> Plan:
    n = 1 if body.n is None else body.n
    if n * len(prompts) > limits.max_choices:
        raise ApiError(400, f"at most {limits.max_choices} choices in one request", "invalid_value", param="n")
    params = sampling_params(body, facts.vocab_size)
    stop = body.stop_strings
    requests, bounds = [], []
    for ids in prompts:
        max_tokens = _bounded_tokens(ids, wanted, facts, limits)
        bounds.append(max_tokens)
        requests += [
            Request(ids, params, max_tokens, stop, logprobs, bool(body.ignore_eos), choice) for choice in range(n)
        ]
    return Plan(tuple(prompts), tuple(requests), params, tuple(bounds), n)


def _bounded_tokens(ids: tuple[int, ...], wanted: int | None, facts: ModelFacts, limits: LimitSettings) -> int:
    if not ids:
        raise ApiError(400, "the prompt is empty", "invalid_value", param="prompt")
    if max(ids) >= facts.vocab_size or min(ids) < 0:
        raise ApiError(
            400,
            f"a token id of the prompt is outside the vocabulary of {facts.vocab_size}",
            "invalid_value",
            param="prompt",
        )
    room = min(facts.max_positions, facts.kv_tokens) - len(ids)
    if room < 1 or (wanted is not None and wanted > room):
        asked = f"{len(ids)} in the prompt" + ("" if wanted is None else f" and {wanted} in the answer")
        raise ApiError(
            400,
            f"this model's maximum context length here is {len(ids) + room} tokens; the request asks for {asked}",
            "context_length_exceeded",
            param="messages",
        )
    return min(room, limits.default_max_tokens) if wanted is None else wanted


def sampling_params(body: GenerationRequest, vocab_size: int) -> SamplingParams:
    """OpenAI's defaults: temperature 1, top_p 1. Without a seed a random one is drawn and the receipt names it.

    Raises: ApiError.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature < TEMPERATURE_MIN:
        # Clients write 1e-9 where they mean greedy; the sampler starts at 2**-10.
        temperature = 0.0
    given: dict[str, Any] = {
        "top_k": max(0, body.top_k or 0),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": _biases(body.logit_bias, vocab_size),
        "seed": secrets.randbits(63) if body.seed is None else body.seed,
    }
    try:
        return SamplingParams(temperature=temperature, **{k: v for k, v in given.items() if v is not None})
    except UsageError as e:
        raise from_veriattn(e) from None


def _biases(biases: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in (biases or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise ApiError(
                400,
                f"logit_bias: {key[:20]!r} is not a token id below {vocab_size}",
                "invalid_value",
                param="logit_bias",
            )
        pairs.append((int(key), value))
    if len(dict(pairs)) != len(pairs):
        raise ApiError(400, "logit_bias names a token id twice", "invalid_value", param="logit_bias")
    return tuple(sorted(pairs))
