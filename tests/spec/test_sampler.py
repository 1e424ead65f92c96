"""The sampler against the specification in plain Python, its distribution, and what it refuses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.spec import oracle

from veriattn.errors import NumericsError, UsageError
from veriattn.spec import sampler
from veriattn.spec.sampler import SamplingParams, logprobs, sample, uniform_u64

offsets = st.one_of(st.just(0.0), st.floats(-1024, 1024).filter(lambda v: abs(v) >= 2.0**-20))
# Many equal logits and few distinct ones, so that every order is decided by ties.
rows = st.one_of(
    st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5 + 2.0**-24, 3.0]), min_size=1, max_size=40),
    st.lists(st.floats(-30, 30, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-40), min_size=1, max_size=40),
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda v: v == 0 or abs(v) > 1), min_size=1, max_size=9),
)


@st.composite
def draws(draw: st.DrawFn) -> tuple[list[float], SamplingParams, list[int], list[int], int, int]:
    row = draw(rows)
    ids = st.integers(0, len(row) - 1)
    biased = draw(st.lists(ids, max_size=3, unique=True))
    params = SamplingParams(
        temperature=draw(st.one_of(st.sampled_from([0.0, 2.0**-10, 0.7, 1.0, 100.0]), st.floats(2.0**-10, 100))),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 1000])),
        top_p=draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.0, math.nextafter(1, 0)]), st.floats(0, 1))),
        min_p=draw(st.one_of(st.sampled_from([0.0, 0.0, 1.0]), st.floats(0, 1))),
        repetition_penalty=draw(st.one_of(st.sampled_from([1.0, 1.0, 1.1]), st.floats(2.0**-10, 2.0**10))),
        presence_penalty=draw(offsets),
        frequency_penalty=draw(offsets),
        logit_bias=tuple((i, draw(offsets)) for i in biased),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
    )
    history = st.lists(ids, max_size=8)
    return row, params, draw(history), draw(history), draw(st.integers(0, 2**17)), draw(st.integers(0, 100))


@settings(max_examples=400, deadline=None)
@given(draws())
def test_as_specified(case: tuple[Any, ...]) -> None:
    row, *rest = case
    logits = np.array(row, np.float32)
    before = logits.copy()
    assert sample(logits, *rest) == oracle.sample(row, *rest)
    assert logits.tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_p": 0.9}, {"top_p": 0.9999999}, {"top_k": 700}, {"min_p": 0.001}, {"top_k": 3000, "top_p": 0.99}],
)
def test_large_vocabularies(changes: dict[str, Any]) -> None:
    """Larger than the pieces in which weights are made and than the first prefix that is sorted for top_p."""
    rng = np.random.default_rng(1)
    # Eighths: hundreds of ids share each logit.
    logits = (np.rint(rng.standard_normal(20_000) * 16) / 8).astype(np.float32)
    for position in range(6):
        params = SamplingParams(temperature=2.0, seed=9, **changes)
        assert sample(logits, params, [], [], position) == oracle.sample(logits.tolist(), params, [], [], position)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert sample(np.array([1, 3, 2, 3], np.float32), SamplingParams(), [], [], 0) == 1
    assert sample(np.array([-1, -0.0, 0.0], np.float32), SamplingParams(), [], [], 0) == 1
    assert sample(np.array([-1, -0.0, 0.0], np.float32), SamplingParams(temperature=1.0, top_k=1), [], [], 0) == 1


def test_the_random_number_is_the_documented_hash() -> None:
    # SHA-256 of b"veriattn/sampler/1" followed by three zero words, computed with coreutils.
    assert uniform_u64(0, 0, 0) == int.from_bytes(bytes.fromhex(ZERO_DRAW), "little")
    assert uniform_u64(-1, 0, 0) == uniform_u64(2**64 - 1, 0, 0)
    assert len({uniform_u64(s, p, c) for s in range(4) for p in range(4) for c in range(4)}) == 64


ZERO_DRAW = "00799e1eee581f98"


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, 3.0, -50.0], np.float32)
    n = 20_000
    counts = Counter(sample(logits, SamplingParams(temperature=1.0), [], [], p) for p in range(n))
    weights = [math.exp(v) for v in logits]
    for i, w in enumerate(weights):
        expected = w / sum(weights) * n
        # Positions are fixed, so this is not a matter of luck; six standard deviations are far from any mistake.
        assert abs(counts[i] - expected) <= 6 * math.sqrt(expected) + 1


def test_seed_position_and_choice_matter_and_nothing_else_does() -> None:
    logits = np.zeros(1000, np.float32)
    params = SamplingParams(temperature=1.0, seed=1)
    first = [sample(logits, params, [], [], p) for p in range(50)]
    assert first == [sample(logits, params, [5], [7], p) for p in range(50)]
    assert first != [sample(logits, dataclasses.replace(params, seed=2), [], [], p) for p in range(50)]
    assert first != [sample(logits, params, [], [], p, choice=1) for p in range(50)]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": 2.0**-11},
        {"temperature": 101.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": None},
        {"temperature": 10**400},
        {"top_k": -1},
        {"top_k": 1.0},
        {"top_k": 2**31},
        {"top_p": 1.01},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 2000.0},
        {"presence_penalty": 1e-30},
        {"frequency_penalty": -2000.0},
        {"frequency_penalty": math.inf},
        {"logit_bias": {1: 2.0}},
        {"logit_bias": ((1, 2.0, 3.0),)},
        {"logit_bias": ((-1, 2.0),)},
        {"logit_bias": ((True, 2.0),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((i, 1.0) for i in range(1025))},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"seed": 1.0},
    ],
)
def test_parameters_out_of_bounds(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**changes)


def test_parameters_at_their_bounds() -> None:
    SamplingParams(2.0**-10, 2**31 - 1, 0.0, 1.0, 2.0**-10, -1024.0, 2.0**-20, ((2**31 - 1, 1024.0),), -(2**63))
    SamplingParams(100, 0, 1, 0, 1, 0, 0, (), 2**64 - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    for at in (0, 3):
        logits = np.zeros(5, np.float32)
        logits[at] = bad
        with pytest.raises(NumericsError):
            sample(logits, SamplingParams(temperature=temperature), [], [], 0)


@pytest.mark.parametrize(
    ("params", "prompt", "output"),
    [
        (SamplingParams(repetition_penalty=1.5), [5], []),
        (SamplingParams(repetition_penalty=1.5), [], [-1]),
        (SamplingParams(presence_penalty=1.5), [], [5]),
        (SamplingParams(logit_bias=((5, 1.0),)), [], []),
    ],
)
def test_ids_outside_the_vocabulary(params: SamplingParams, prompt: list[int], output: list[int]) -> None:
    with pytest.raises(UsageError):
        sample(np.zeros(5, np.float32), params, prompt, output, 0)


def test_logprobs() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    value, top = logprobs(logits, 0, 3)
    total = math.log(sum(math.exp(v) for v in logits))
    assert math.isclose(value, -total, rel_tol=1e-12)
    assert [i for i, _ in top] == [1, 3, 2] and top[0][1] == top[1][1] == pytest.approx(2 - total, rel=1e-12)
    assert logprobs(logits, 0, 0)[1] == [] and len(logprobs(logits, 0, 99)[1]) == 4


FORBIDDEN = {"exp", "exp2", "log", "log2", "power", "sum", "mean", "dot", "matmul", "random", "einsum"}


def uses(function: Any) -> set[str]:
    """Names of NumPy and math functions that the source of `function` calls."""
    tree = ast.parse(inspect.getsource(function))
    attributes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    return {n.attr for n in attributes if n.value.id in ("np", "math")}


def test_no_library_function_decides_a_token() -> None:
    parts = (sampler.sample, sampler._adjust, sampler._weights, sampler._first_in_order, sampler._nucleus, sampler.exp2)
    for function in parts:
        assert not uses(function) & FORBIDDEN
    # The test can fail: logprobs may use them and does.
    assert uses(logprobs) & FORBIDDEN == {"exp", "log"}
