"""The checks themselves: honest claims pass, any wrong element is met, against the reference in Python integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers import LocalModel, tiny_config, tiny_tensors

from veriattn.errors import AttentionMismatch, FreivaldsMismatch
from veriattn.native import project_weights, value_projection
from veriattn.spec.field import OUTPUT_LIMIT, P
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry
from veriattn.spec.model import ModelConfig
from veriattn.verifier.checks import CheckCounts, ClaimChecker, VerifiedCache
from veriattn.verifier.keys import KeySet

CONFIG = tiny_config(num_heads=6, num_kv_heads=2, head_dim=12, rotary_dim=12, num_layers=1, vocab_size=50)
TENSORS = tiny_tensors(CONFIG)
GROUP = CONFIG.num_heads // CONFIG.num_kv_heads
RNG = np.random.default_rng(0)


def make_keys(config: ModelConfig = CONFIG) -> KeySet:
    keys = KeySet(config)
    for name in config.linear_shapes():
        r, u = keys.linear(name)
        project_weights(TENSORS[f"{name}.weight"], r, u)
    return keys


def make_checker(track_scores: bool = True) -> ClaimChecker:
    return ClaimChecker(CONFIG, make_keys(), track_scores, CheckCounts())


def int8(*shape: int) -> np.ndarray:
    return RNG.integers(-127, 128, shape).astype(np.int8)


def attention_input(tokens: int) -> AttentionInput:
    c = CONFIG
    return AttentionInput(
        int8(tokens, c.num_heads, c.head_dim),
        RNG.uniform(1e-4, 1e-2, (tokens, c.num_heads)).astype(np.float32),
        int8(tokens, c.num_kv_heads, c.head_dim),
        RNG.uniform(0.01, 1, (tokens, c.num_kv_heads)).astype(np.float32),
        int8(tokens, c.num_kv_heads, c.head_dim),
    )


class Attended:
    """A sequence in two runs on an honest prover and in a checker: the second run's claims and what the checker needs."""

    def __init__(self, first: int, second: int) -> None:
        self.checker, local = make_checker(), LocalModel(CONFIG, TENSORS).ops
        self.start = first
        if first:
            x, batch = attention_input(first), Batch((BatchEntry(0, 0, (1,) * first),))
            local.attention(0, batch, x)
            self.checker.append(0, batch, x)
        self.x, batch = attention_input(second), Batch((BatchEntry(0, first, (1,) * second),))
        self.o, self.row_sum = local.attention(0, batch, self.x)
        self.scores = local.scores(0, 0, self.x.q_i8, first + second)
        (self.before,) = self.checker.append(0, batch, self.x)

    def replay(self, o: np.ndarray) -> np.ndarray:
        row_sum, pg = self.checker.expected_by_replay(0, 0, self.start, self.x.q_i8, self.x.q_scale)
        self.checker.outputs(0, 0, self.start, o, pg)
        return row_sum

    def transfer(self, scores: np.ndarray, o: np.ndarray) -> np.ndarray:
        row_sum, pg = self.checker.expected_by_transfer(
            0, 0, self.start, self.x.q_i8, self.x.q_scale, self.x.k_i8, self.before, scores
        )
        self.checker.outputs(0, 0, self.start, o, pg)
        return row_sum


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(st.sampled_from(sorted(CONFIG.linear_shapes())), st.integers(1, 9), st.data())
def test_linear(name: str, tokens: int, data: Any) -> None:
    checker = make_checker()
    out, inp = CONFIG.linear_shapes()[name]
    a = int8(tokens, inp)
    y = a.astype(np.int32) @ TENSORS[f"{name}.weight"].astype(np.int32).T
    assert checker.linear(name, a, y) is y
    assert checker.counts.linear_rows == tokens
    row, column = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, out - 1))
    wrong = data.draw(st.integers(-(2**31), 2**31 - 1).filter(lambda v: v != y[row, column]))
    lie = y.copy()
    lie[row, column] = wrong
    with pytest.raises(FreivaldsMismatch, match=f"{name}: .* row {row} of {tokens}") as caught:
        checker.linear(name, a, lie)
    assert str(wrong) not in str(caught.value) or abs(wrong) < 10_000
    assert checker.counts.linear_rows == tokens, "a rejected claim was counted"


@quick
@given(st.integers(0, 300), st.integers(1, 5), st.data())
def test_attention_output(first: int, second: int, data: Any) -> None:
    run = Attended(first, second)
    assert np.array_equal(run.replay(run.o), run.row_sum)
    assert np.array_equal(run.transfer(run.scores, run.o), run.row_sum)
    at = tuple(data.draw(st.integers(0, n - 1)) for n in run.o.shape)
    error = data.draw(
        st.one_of(
            st.integers(-3, 3), st.integers(-(2**39), 2**39), st.integers(-(2**12), 2**12).map(lambda k: k * P)
        ).filter(bool)
    )
    lie = run.o.copy()
    lie[at] += error
    where = f"position {first + at[0]}, head {at[1]}" if abs(int(lie[at])) < OUTPUT_LIMIT else r"2\*\*39"
    for check in (run.replay, lambda o: run.transfer(run.scores, o)):
        with pytest.raises(AttentionMismatch, match=where):
            check(lie)


@quick
@given(st.integers(0, 300), st.integers(1, 5), st.data())
def test_attention_scores(first: int, second: int, data: Any) -> None:
    """Every score that a row sees is checked; those that it does not see change nothing."""
    run = Attended(first, second)
    head, row = data.draw(st.integers(0, CONFIG.num_heads - 1)), data.draw(st.integers(0, second - 1))
    key = data.draw(st.integers(0, first + second - 1))
    lie = run.scores.copy()
    lie[head, row, key] = data.draw(st.integers(-(2**31), 2**31 - 1).filter(lambda v: v != lie[head, row, key]))
    if key > first + row:
        assert np.array_equal(run.transfer(lie, run.o), run.row_sum)
        return
    with pytest.raises(AttentionMismatch, match=f"position {first + row}, head {head}: the claimed scores"):
        run.transfer(lie, run.o)


@pytest.mark.parametrize("value", [OUTPUT_LIMIT, -OUTPUT_LIMIT, 2**63 - 1, -(2**63), OUTPUT_LIMIT + P])
def test_outputs_out_of_range_are_refused_by_type(value: int) -> None:
    run = Attended(3, 2)
    run.o[1, 2, 3] = value
    with pytest.raises(AttentionMismatch, match=r"2\*\*39 or larger"):
        run.replay(run.o)


@pytest.mark.parametrize("value", [OUTPUT_LIMIT - 1, 1 - OUTPUT_LIMIT])
def test_outputs_at_the_edge_of_the_range_are_refused_by_the_check(value: int) -> None:
    run = Attended(3, 2)
    run.o[1, 2, 3] = value
    with pytest.raises(AttentionMismatch, match="position 4, head 2: the claimed output is wrong"):
        run.replay(run.o)


def batch_of_three() -> tuple[ClaimChecker, Batch, np.ndarray, list[np.ndarray]]:
    """Runs of 2, 1 and 3 tokens: a checker that has them, the batch, the true outputs and what they must project to."""
    local, checker, counts = LocalModel(CONFIG, TENSORS).ops, make_checker(), (2, 1, 3)
    batch = Batch(tuple(BatchEntry(i + 5, 0, (1,) * n) for i, n in enumerate(counts)))
    x = attention_input(sum(counts))
    o, _ = local.attention(0, batch, x)
    checker.append(0, batch, x)
    expected = [
        checker.expected_by_replay(0, e.seq_id, 0, x.q_i8[rows], x.q_scale[rows])[1]
        for e, rows in zip(batch.entries, batch.slices(), strict=True)
    ]
    return checker, batch, o, expected


@quick
@given(st.data())
def test_outputs_of_a_batch(data: Any) -> None:
    checker, batch, o, expected = batch_of_three()
    checker.batch_outputs(0, batch, o, expected)
    assert checker.counts.attention_rows == o.shape[0] * o.shape[1]
    at = tuple(data.draw(st.integers(0, n - 1)) for n in o.shape)
    lie = o.copy()
    lie[at] += data.draw(st.sampled_from([1, -1, 2**38, P, -P, 2**62]))
    entry = next(e for e, rows in zip(batch.entries, batch.slices(), strict=True) if rows.start <= at[0] < rows.stop)
    with pytest.raises(AttentionMismatch, match=f"sequence {entry.seq_id}[,:]"):
        checker.batch_outputs(0, batch, lie, expected)


def test_outputs_of_a_batch_are_as_many_as_were_asked_for() -> None:
    checker, batch, o, expected = batch_of_three()
    with pytest.raises(ValueError, match="zip"):
        checker.batch_outputs(0, batch, o, expected[:2])


def test_one_repetition_would_not_be_enough_to_see_this() -> None:
    """A lie made with one repetition's challenges in hand passes that one; the other meets it."""
    checker = make_checker()
    r, _ = checker.keys.linear("layers.0.o")
    a = int8(1, CONFIG.attention_size)
    y = a.astype(np.int32) @ TENSORS["layers.0.o.weight"].astype(np.int32).T
    # A short vector e with e.r[0] = 0 mod p, by lattice of two steps of Euclid's algorithm over four columns.
    e = short_relation([int(v) for v in r[0][:4]])
    lie = y.copy()
    lie[0, :4] += np.array(e, np.int32)
    assert sum(x * int(v) for x, v in zip(e, r[0][:4], strict=True)) % P == 0
    with pytest.raises(FreivaldsMismatch):
        checker.linear("layers.0.o", a, lie)


def short_relation(r: list[int]) -> list[int]:
    """Integers e, not all 0 and below 2**31, with e.r = 0 mod p (LLL on the lattice of relations, exact fractions)."""
    from fractions import Fraction

    n = len(r)
    inverse = pow(r[0], -1, P)
    basis = [[P] + [0] * (n - 1)]
    for i in range(1, n):
        row = [0] * n
        row[0], row[i] = -r[i] * inverse % P, 1
        basis.append(row)

    def dot(u: list[Any], v: list[Any]) -> Fraction:
        return sum((Fraction(a) * b for a, b in zip(u, v, strict=True)), Fraction(0))

    def orthogonal() -> tuple[list[list[Fraction]], list[list[Fraction]]]:
        stars: list[list[Fraction]] = []
        mu = [[Fraction(0)] * n for _ in range(n)]
        for i in range(n):
            star = [Fraction(v) for v in basis[i]]
            for j in range(i):
                mu[i][j] = dot(basis[i], stars[j]) / dot(stars[j], stars[j])
                star = [a - mu[i][j] * b for a, b in zip(star, stars[j], strict=True)]
            stars.append(star)
        return stars, mu

    k = 1
    while k < n:
        for j in range(k - 1, -1, -1):
            _, mu = orthogonal()
            q = round(mu[k][j])
            if q:
                basis[k] = [a - q * b for a, b in zip(basis[k], basis[j], strict=True)]
        stars, mu = orthogonal()
        if dot(stars[k], stars[k]) >= (Fraction(3, 4) - mu[k][k - 1] ** 2) * dot(stars[k - 1], stars[k - 1]):
            k += 1
        else:
            basis[k], basis[k - 1] = basis[k - 1], basis[k]
            k = max(k - 1, 1)
    return basis[0]


def test_cache_overwrites_what_it_frees() -> None:
    keys = make_keys()
    cache = VerifiedCache(CONFIG, keys, track_scores=True)
    x = attention_input(4)
    for seq_id in (1, 2):
        g = value_projection(x.v_i8, keys.attention(0))
        cache.append(0, BatchEntry(seq_id, 0, (1,) * 4), x.k_i8, x.k_scale, g)
    sums = dict(cache._sums[0])
    page = int(cache.layer(0).table(1)[0])
    assert cache.layer(0).arrays["g"][page].any() and sums[1].any()
    cache.free(1)
    assert not any(a[page].any() for a in cache.layer(0).arrays.values())
    assert not sums[1].any() and sums[2].any()
    cache.close()
    assert not any(a.any() for a in cache.layer(0).arrays.values()) and not sums[2].any()


def test_heads_use_the_keys_of_their_group() -> None:
    """The reference is a loop over heads with `h // group`; another mapping would give other sums."""
    run = Attended(5, 1)
    row_sum, _ = run.checker.expected_by_replay(0, 0, 5, run.x.q_i8, run.x.q_scale)
    swapped, _ = run.checker.expected_by_replay(
        0, 0, 5, np.ascontiguousarray(run.x.q_i8[:, ::-1]), np.ascontiguousarray(run.x.q_scale[:, ::-1])
    )
    assert np.array_equal(row_sum, run.row_sum)
    assert not np.array_equal(swapped[:, ::-1], run.row_sum)
    assert GROUP == 3


@pytest.mark.parametrize("delta", [1, -1])
def test_every_position_of_a_claim(delta: int) -> None:
    """The smallest lie, at each element of each claim of a small step, one after the other."""
    checker = make_checker()
    for name, (out, inp) in CONFIG.linear_shapes().items():
        a = int8(2, inp)
        y = a.astype(np.int32) @ TENSORS[f"{name}.weight"].astype(np.int32).T
        for row, column in np.ndindex(2, out):
            y[row, column] += delta
            with pytest.raises(FreivaldsMismatch):
                checker.linear(name, a, y)
            y[row, column] -= delta
        checker.linear(name, a, y)
    run = Attended(3, 2)
    for at in np.ndindex(run.o.shape):
        run.o[at] += delta
        with pytest.raises(AttentionMismatch):
            run.replay(run.o)
        run.o[at] -= delta
    for head, row, key in np.ndindex(run.scores.shape):
        run.scores[head, row, key] += delta
        if key <= 3 + row:
            with pytest.raises(AttentionMismatch):
                run.transfer(run.scores, run.o)
        run.scores[head, row, key] -= delta
    run.transfer(run.scores, run.o)
