"""Canonical sampling: checked logits, parameters and a seed to one token id, the same on every machine.

docs/spec.md section 10. Floats are binary32, one rounding per operation; weights are integers, so that their sums have
no order; the random number is a hash of (seed, position, choice). There is no state between tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veriattn.errors import NumericsError, UsageError
from veriattn.spec.constants import LOG2E
from veriattn.spec.reference import F32, I64, exp2

DOMAIN = b"veriattn/sampler/1"

TEMPERATURE_MIN, TEMPERATURE_MAX = 2.0**-10, 100.0
PENALTY_FLOOR, PENALTY_MAX = 2.0**-20, 2.0**10
MAX_LOGIT_BIASES = 1024

_WEIGHT_ONE = np.float32(2.0**30)
_Z_MIN = np.float32(-64.0)
_PREFIXES = (512, 8192)
_PIECE = 8192


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{name} must be finite")
    return number


def _integer(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{name} must be an integer from {low} to {high}")
    return value


@dataclass(frozen=True)
class SamplingParams:
    """What turns logits into a token; temperature 0 is greedy and the default.

    Bounds: temperature 0 or 2**-10..100; top_k >= 0 (0: off); top_p and min_p in 0..1 (1 and 0: off); repetition_penalty
    2**-10..2**10 (1: off); presence and frequency penalties and biases 0 or 2**-20..2**10 in size (biases at most 1024,
    distinct ids); seed -2**63..2**64-1, taken modulo 2**64.

    Raises: UsageError outside of these bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        t = _number("temperature", self.temperature)
        if t != 0 and not TEMPERATURE_MIN <= t <= TEMPERATURE_MAX:
            raise UsageError(
                f"temperature {t!r} is neither 0 nor from {TEMPERATURE_MIN} to {TEMPERATURE_MAX}",
                hint="0 always takes the most likely token",
            )
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        for name in ("top_p", "min_p"):
            if not 0 <= _number(name, getattr(self, name)) <= 1:
                raise UsageError(f"{name} must be from 0 to 1")
        if not 1 / PENALTY_MAX <= _number("repetition_penalty", self.repetition_penalty) <= PENALTY_MAX:
            raise UsageError(
                f"repetition_penalty must be from 2**-10 to {PENALTY_MAX:.0f}", hint="1 switches it off; 1.1 is usual"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_offset(name, getattr(self, name))
        if not isinstance(self.logit_bias, tuple) or len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise UsageError(f"logit_bias must be a tuple of at most {MAX_LOGIT_BIASES} pairs (token id, bias)")
        for pair in self.logit_bias:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise UsageError("logit_bias must hold pairs (token id, bias)")
            _integer("a token id of logit_bias", pair[0], 0, 2**31 - 1)
            self._check_offset("a bias of logit_bias", pair[1])
        if len({i for i, _ in self.logit_bias}) != len(self.logit_bias):
            raise UsageError("logit_bias names a token id twice")
        _integer("seed", self.seed, -(2**63), 2**64 - 1)

    @staticmethod
    def _check_offset(name: str, value: object) -> None:
        size = abs(_number(name, value))
        if size != 0 and not PENALTY_FLOOR <= size <= PENALTY_MAX:
            raise UsageError(f"{name} must be 0 or from 2**-20 to {PENALTY_MAX:.0f} in size")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, so that the seed does not matter."""
        return self.temperature == 0


def _adjust(logits: F32, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> F32:
    """Penalties and biases, in this order; returns `logits` itself where there are none."""
    repetition, bias = params.repetition_penalty != 1, params.logit_bias
    counted = params.frequency_penalty != 0 or params.presence_penalty != 0
    if not (repetition or bias or counted):
        return logits
    vocab = logits.shape[0]
    x = logits.copy()
    if repetition and (seen := {*prompt_ids, *output_ids}):
        ids = _checked_ids(list(seen), vocab)
        factor = np.float32(params.repetition_penalty)
        x[ids] = np.where(x[ids] > 0, x[ids] / factor, x[ids] * factor)
    if counted and output_ids:
        counts = Counter(output_ids)
        ids = _checked_ids(list(counts), vocab)
        n = np.array(list(counts.values()), dtype=np.float32)
        x[ids] = (x[ids] - np.float32(params.frequency_penalty) * n) - np.float32(params.presence_penalty)
    if bias:
        ids = _checked_ids([i for i, _ in bias], vocab)
        x[ids] += np.array([b for _, b in bias], dtype=np.float32)
    return x


def _checked_ids(ids: list[int], vocab: int) -> I64:
    array = np.array(ids, dtype=np.int64)
    if array.min() < 0 or array.max() >= vocab:
        raise UsageError(
            f"a token id is outside the vocabulary of {vocab}", hint="look at logit_bias and the prompt's ids"
        )
    return array


def _weights(logits: F32, top: np.float32, temperature: float) -> I64:
    """w of docs/spec.md section 10.4, in 0..2**30. Elementwise, so the pieces, which stay in cache, change no bit."""
    scale = LOG2E / np.float32(temperature)
    weights = np.empty(logits.shape, np.int64)
    for at in range(0, logits.shape[0], _PIECE):
        z = np.maximum((logits[at : at + _PIECE] - top) * scale, _Z_MIN)
        weights[at : at + _PIECE] = np.rint(exp2(z) * _WEIGHT_ONE)
    return weights


def _first_in_order(logits: F32, candidates: I64 | None, count: int) -> I64:
    """The first `count` candidates by (logit descending, id ascending); None are all ids."""
    x = logits if candidates is None else logits[candidates]
    if count < len(x):
        kth = np.partition(x, len(x) - count)[len(x) - count]
        among: I64 = np.flatnonzero(x >= kth)
        candidates = among if candidates is None else candidates[among]
    elif candidates is None:
        candidates = np.arange(len(x))
    # One integer per candidate, all different, whose order is the one asked for: the bits of a float ascend with its
    # value once those of negative ones are turned around. Adding 0 makes -0 equal to 0.
    bits = (logits[candidates] + np.float32(0)).view(np.int32).astype(np.int64)
    keys = (-(bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | candidates
    keys.sort()
    first: I64 = keys[:count] & 0xFFFFFFFF
    return first


def _nucleus(logits: F32, weights: I64, kept: I64 | None, q: int) -> I64:
    """The shortest prefix of `kept`, by (logit descending, id ascending), that weighs at least ceil(q * sum / 2**32)."""
    need = -(-q * int((weights if kept is None else weights[kept]).sum()) // 2**32)
    for count in (*_PREFIXES, len(logits)):
        prefix = _first_in_order(logits, kept, count)
        cumulative = np.cumsum(weights[prefix])
        if cumulative[-1] >= need:
            break
    return prefix[: int(np.searchsorted(cumulative, need, side="left")) + 1]


def uniform_u64(seed: int, position: int, choice: int) -> int:
    """The random number of one token: 64 bits of SHA-256 over the domain, seed, position and choice."""
    message = DOMAIN + b"".join((v % 2**64).to_bytes(8, "little") for v in (seed, position, choice))
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little")


def sample(
    logits: F32,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    position: int,
    choice: int = 0,
) -> int:
    """The token that the canonical function draws from one row of logits.

    Shapes: logits (vocab,) float32, finite. `position` is the index of the new token in its sequence (prompt and output),
    `choice` the index among several answers to one prompt. Integer sums: weights <= 2**30, vocabulary < 2**31, so below
    2**61 in int64; larger products are Python integers.

    Raises: NumericsError for logits that are not finite; UsageError for ids outside the vocabulary.
    """
    x = _adjust(logits, params, prompt_ids, output_ids)
    best = int(np.argmax(x))
    top = x[best]
    # argmax finds a NaN first, and +inf is a maximum: neither hides. -inf would be the least likely token, as it should.
    if not np.isfinite(top):
        raise NumericsError("a logit is not finite", hint="the model does not fit the canonical numerics")
    if params.greedy or params.top_k == 1:
        return best
    weights = _weights(x, top, params.temperature)
    u = uniform_u64(params.seed, position, choice)
    q_min, q_top = math.floor(params.min_p * 2**32), math.floor(params.top_p * 2**32)
    kept = None if q_min == 0 else np.flatnonzero(weights >= -(-q_min // 4))
    if params.top_k > 0:
        kept = np.sort(_first_in_order(x, kept, params.top_k))
    if q_top < 2**32:
        kept = np.sort(_nucleus(x, weights, kept, q_top))
    return _draw(weights, u) if kept is None else int(kept[_draw(weights[kept], u)])


def _draw(weights: I64, u: int) -> int:
    """The first index whose cumulative weight exceeds (u * sum) >> 64. Overwrites `weights`."""
    cumulative = np.cumsum(weights, out=weights)
    return int(np.searchsorted(cumulative, (u * int(cumulative[-1])) >> 64, side="right"))


def logprobs(logits: F32, token_id: int, top_n: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probability of `token_id` and the `top_n` most likely (id, logprob), ties to the lowest id.

    Informational: binary64 and this machine's libm, over the logits as the model gave them, before any parameter.
    """
    x = logits.astype(np.float64)
    x -= x.max()
    x -= math.log(float(np.exp(x).sum()))
    n = min(top_n, len(x))
    ids = _first_in_order(logits, None, n) if n > 0 else np.empty(0, np.int64)
    return float(x[token_id]), [(int(i), float(x[i])) for i in ids]
