"""What a request's body settles of its answer, as the server reads it: what a receipt may not say otherwise."""

from __future__ import annotations

from dataclasses import replace

from veriattn.attest.canonical import Json
from veriattn.errors import UsageError
from veriattn.spec.sampler import TEMPERATURE_MIN, SamplingParams

#: OpenAI's documented defaults: of every request, and of how many tokens a plain completion has.
_TEMPERATURE, _COMPLETION_TOKENS = 1.0, 16
_PLAIN = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def sampling(body: Json, drawn_seed: int) -> tuple[SamplingParams, bool]:
    """The sampler's parameters, biases by ascending id and the seed modulo 2**64, and whether end-of-text tokens are ignored.

    drawn_seed: the server's, for a request that names none.

    Raises: UsageError for what the server refuses.
    """
    given = {name: body[name] for name in _PLAIN if body.get(name) is not None}
    temperature = _TEMPERATURE if body.get("temperature") is None else body["temperature"]
    top_k, seed, ignore_eos = body.get("top_k") or 0, body.get("seed"), body.get("ignore_eos") or False
    if type(ignore_eos) is not bool or type(top_k) is not int:
        raise UsageError("the request's ignore_eos is not true or false, or its top_k no integer")
    params = SamplingParams(
        temperature=0.0 if _is_greedy(temperature) else temperature,
        top_k=max(0, top_k),
        logit_bias=_biases(body.get("logit_bias") or {}),
        seed=drawn_seed if seed is None else seed,
        **given,
    )
    return replace(params, seed=params.seed % 2**64), ignore_eos


def _is_greedy(temperature: object) -> bool:
    return type(temperature) in (int, float) and 0 <= temperature < TEMPERATURE_MIN  # type: ignore[operator]


def _biases(biases: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(biases, dict) or not all(k.isascii() and k.isdigit() and len(k) < 10 for k in biases):
        raise UsageError("the request's logit_bias is no object of token ids")
    return tuple(sorted((int(k), v) for k, v in biases.items()))


def choices(body: Json, prompts: int) -> list[tuple[int, int, int]]:
    """(index, prompt, choice) of each choice in order. Raises: UsageError."""
    n = 1 if body.get("n") is None else body["n"]
    if type(n) is not int or not 1 <= n <= 128:
        raise UsageError("the request's n is no number of choices")
    return [(i, i // n, i % n) for i in range(n * prompts)]


def max_tokens(body: Json, of_receipt: object) -> int | None:
    """How many tokens an answer may have at most. Of a chat without a bound, the receipt is the only record."""
    wanted = body.get("max_tokens")
    if "messages" in body:
        longer = body.get("max_completion_tokens")
        wanted = wanted if longer is None else longer
        wanted = of_receipt if wanted is None else wanted
    elif wanted is None:
        wanted = _COMPLETION_TOKENS
    return wanted if type(wanted) is int else None
