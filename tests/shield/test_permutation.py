"""Permutations of the shield: inverse, within heads, shared in a group, secret, and without effect on scores."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veriattn.errors import InternalError
from veriattn.shield import permutation
from veriattn.shield.permutation import HeadPermutation, LayerShield, Shield, random_permutation
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry
from veriattn.spec.model import ModelConfig


def config(kv_heads: int = 3, group: int = 2, head_dim: int = 8) -> ModelConfig:
    return ModelConfig(
        hidden_size=24, num_layers=2, num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=32, vocab_size=37, max_positions=64, rotary_dim=head_dim, rms_eps=1e-5,
    )  # fmt: skip


def int8(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    return rng.integers(-127, 128, shape).astype(np.int8)


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 7, 16]), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_apply_and_restore_are_inverse(kv_heads: int, group: int, d: int, signed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = HeadPermutation.draw(kv_heads, d, signed=signed)
    x = int8(rng, 5, kv_heads * group, d)
    shown = p.apply(x)
    assert np.array_equal(p.restore(shown.astype(np.int64), 0, group), x)
    keys = int8(rng, 5, kv_heads, d)
    assert np.array_equal(p.restore(p.apply(keys).astype(np.int64)), keys)
    # Any block of KV heads on its own: as many heads in all may be few KV heads of large groups or many of small ones.
    for first in range(kv_heads):
        part = shown[:, first * group : (first + 1) * group].astype(np.int64)
        assert np.array_equal(p.restore(part, first, group), x[:, first * group : (first + 1) * group])


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=30, deadline=None)
def test_scores_do_not_change_and_entries_stay_within_their_head(seed: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    p = HeadPermutation.draw(3, 16, signed=signed)
    q, k = int8(rng, 4, 6, 16), int8(rng, 9, 3, 16)
    q_shown, k_shown = p.apply(q).astype(np.int64), p.apply(k).astype(np.int64)
    for head in range(6):
        before = q[:, head].astype(np.int64) @ k[:, head // 2].astype(np.int64).T
        assert np.array_equal(before, q_shown[:, head] @ k_shown[:, head // 2].T)
    assert np.array_equal(np.sort(np.abs(p.apply(k)), axis=2), np.sort(np.abs(k), axis=2))


def test_a_key_head_under_another_heads_permutation_would_change_the_scores() -> None:
    rng = np.random.default_rng(1)
    p = HeadPermutation.draw(2, 16, signed=False)
    q, k = int8(rng, 1, 2, 16), int8(rng, 5, 2, 16)
    swapped = HeadPermutation(p.order[::-1].copy())
    right = p.apply(q).astype(np.int64)[:, 0] @ p.apply(k).astype(np.int64)[:, 0].T
    wrong = p.apply(q).astype(np.int64)[:, 0] @ swapped.apply(k).astype(np.int64)[:, 0].T
    assert not np.array_equal(right, wrong)


def test_never_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Size 2 has one other permutation, and it is always taken; a generator that would give the identity is asked again."""
    assert all(random_permutation(2).tolist() == [1, 0] for _ in range(50))
    answers = iter([1, 0])
    monkeypatch.setattr(permutation.secrets, "randbelow", lambda _n: next(answers))
    assert random_permutation(2).tolist() == [1, 0]
    assert next(answers, None) is None


def test_drawn_from_the_systems_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = secrets.randbelow

    def counted(n: int) -> int:
        calls.append(n)
        return real(n)

    monkeypatch.setattr(permutation.secrets, "randbelow", counted)
    LayerShield.draw(config(), signed=False)
    assert len(calls) >= 2 * 3 * 7  # two permutations of three heads, Fisher-Yates over eight entries


def test_the_printed_single_head_formula_without_rotary_embedding() -> None:
    """x (W P) = (x W) P, softmax(q P (k P)^T) v P P^T = softmax(q k^T) v: exact in integers up to the softmax itself."""
    rng = np.random.default_rng(3)
    d, n = 8, 6
    x = rng.integers(-9, 10, (n, d))
    wq, wk, wv = (rng.integers(-9, 10, (d, d)) for _ in range(3))
    order, order_v = random_permutation(d), random_permutation(d)
    p, pv = np.eye(d, dtype=np.int64)[:, order], np.eye(d, dtype=np.int64)[:, order_v]
    assert np.array_equal((x @ (wq @ p)), (x @ wq) @ p)
    scores, permuted = (x @ wq) @ (x @ wk).T, (x @ wq @ p) @ (x @ wk @ p).T
    assert np.array_equal(scores, permuted)
    weights = (scores - scores.min()) % 97  # any function of the scores
    assert np.array_equal(weights @ (x @ wv @ pv) @ pv.T, weights @ (x @ wv))


def test_projection_rows_come_back_in_order() -> None:
    c = config()
    shield = Shield(c, "static")
    rng = np.random.default_rng(4)
    w = int8(rng, c.qkv_size, c.hidden_size)
    a = int8(rng, 5, c.hidden_size)
    claimed = (a.astype(np.int64) @ w[shield.row_order(1)].astype(np.int64).T).astype(np.int32)
    assert np.array_equal(shield.restore_projection(1, claimed), a.astype(np.int64) @ w.astype(np.int64).T)
    assert sorted(shield.row_order(0).tolist()) == list(range(c.qkv_size))
    assert not np.array_equal(shield.row_order(0), shield.row_order(1))


def test_sequences_have_permutations_of_their_own_and_lose_them() -> None:
    c = config()
    shield = Shield(c, "session")
    rng = np.random.default_rng(5)
    batch = Batch((BatchEntry(3, 0, (1, 2)), BatchEntry(4, 0, (1, 2))))
    one = int8(rng, 2, 3, 8)
    x = AttentionInput(
        int8(rng, 4, 6, 8), np.ones((4, 6), np.float32), np.concatenate([one, one]), np.ones((4, 3), np.float32),
        np.concatenate([one, one]),
    )  # fmt: skip
    shown = shield.apply(0, batch, x)
    assert not np.array_equal(shown.v_i8[:2], shown.v_i8[2:])
    assert not np.array_equal(shown.k_i8[:2], shown.k_i8[2:])
    held = shield.layer(0, 3)
    shield.free(3)
    assert not held.qk.order.any() and not held.v.order.any()
    assert held.qk.sign is not None and not held.qk.sign.any()
    assert "3" not in repr(shield) and "secret" in repr(held.qk)


def test_a_shield_that_is_off_cannot_be_made() -> None:
    with pytest.raises(InternalError):
        Shield(config(), "off")
