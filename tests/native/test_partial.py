"""Kernels for shares of attention against spec.partial, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veriattn.errors import InternalError
from veriattn.native import partial as native
from veriattn.spec import partial as reference
from veriattn.spec.field import P
from veriattn.spec.kv import PAGE
from veriattn.spec.reference import attention_contiguous, gather_pages

EXACT = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


Array = npt.NDArray[Any]


def by_head(x: Array) -> Array:
    """(keys, kv_heads, ...) as a piece of keys lies in memory: (kv_heads, keys, ...)."""
    return np.ascontiguousarray(x.swapaxes(0, 1))


def scores_of(q: Array, k: Array) -> Array:
    out = np.empty((q.shape[1], q.shape[0], k.shape[0]), np.int32)
    native.share_scores_into(out, 0, k.shape[0], q, by_head(k))
    return out


def maximum_of(scores: Array, k_scale: Array) -> Array:
    out = np.full((scores.shape[1], scores.shape[0]), -np.inf, np.float32)
    native.share_maximum_into(out, scores, 0, scores.shape[2], by_head(k_scale))
    return out


def outputs_of(p: Array, v: Array) -> Array:
    out = np.zeros((p.shape[1], p.shape[0], v.shape[2]), np.int64)
    native.share_outputs_into(out, p, 0, p.shape[2], by_head(v))
    return out


class Case:
    """Random operands; extreme scales now and then."""

    def __init__(self, seed: int, rows: int, kv_heads: int, group: int, d: int, keys: int, pages: int) -> None:
        rng = np.random.default_rng(seed)
        heads = kv_heads * group
        full = seed % 3 == 0
        self.q = rng.integers(-127, 128, (rows, heads, d), dtype=np.int8)
        self.q_scale = rng.uniform(1e-7, 1e-3, (rows, heads)).astype(np.float32)
        self.table = rng.permutation(pages).astype(np.int32)
        self.k_pages = rng.integers(-127, 128, (pages, kv_heads, PAGE, d), dtype=np.int8)
        self.v_pages = rng.integers(-127, 128, (pages, kv_heads, PAGE, d), dtype=np.int8)
        if full:
            self.v_pages[...] = -127
        self.scale_pages = rng.uniform(1e-3, 2, (pages, kv_heads, PAGE)).astype(np.float32)
        self.g_pages = rng.integers(0, P, (pages, kv_heads, PAGE, 2), dtype=np.uint64)
        if full:
            self.g_pages[...] = P - 1
        self.k, self.v, self.k_scale, self.g = (
            gather_pages(a, self.table, keys) for a in (self.k_pages, self.v_pages, self.scale_pages, self.g_pages)
        )


SIZES = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.integers(1, 9),
    "kv_heads": st.integers(1, 3),
    "group": st.integers(1, 5),
    "d": st.sampled_from([4, 12, 16, 64, 72, 128, 200, 256, 260]),
    "keys": st.integers(0, 700),
}


@EXACT
@given(**SIZES)
def test_shares_in_one_piece(isa: str, seed: int, rows: int, kv_heads: int, group: int, d: int, keys: int) -> None:
    c = Case(seed, rows, kv_heads, group, d, keys, 3)
    scores = scores_of(c.q, c.k)
    assert np.array_equal(scores, reference.share_scores(c.q, c.k))
    row_max = maximum_of(scores, c.k_scale)
    assert np.array_equal(row_max, reference.share_maximum(scores, c.k_scale))
    row_max = np.maximum(row_max, np.float32(seed % 1000))
    p, row_sum = np.empty(scores.shape, np.uint16), np.zeros(row_max.shape, np.int32)
    native.share_weights_into(p, row_sum, None, scores, 0, keys, c.q_scale, by_head(c.k_scale), row_max)
    assert np.array_equal(p, reference.share_weights(scores, c.q_scale, c.k_scale, row_max))
    assert np.array_equal(row_sum, reference.share_sums(p))
    assert np.array_equal(outputs_of(p, c.v), reference.share_outputs(p, c.v))
    pg = np.zeros((rows, kv_heads * group, 2), np.uint64)
    native.share_projection_into(pg, p, 0, keys, by_head(c.g))
    assert np.array_equal(pg, reference.share_projection(p, c.g))


@EXACT
@given(**SIZES, cut=st.floats(0, 1))
def test_shares_in_pages_follow_one_another(
    isa: str, seed: int, rows: int, kv_heads: int, group: int, d: int, keys: int, cut: float
) -> None:
    """Keys cut in two shares, the first in one piece, the second in pages: the bits of one share."""
    c = Case(seed, rows, kv_heads, group, d, keys, 3)
    first = int(cut * keys)
    other = Case(seed + 1, rows, kv_heads, group, d, keys, 3)
    k, v, k_scale, g = (
        np.concatenate([a[:first], b[: keys - first]])
        for a, b in ((c.k, other.k), (c.v, other.v), (c.k_scale, other.k_scale), (c.g, other.g))
    )
    shares = ((0, first, c, None), (first, keys - first, other, other.table))
    heads = kv_heads * group
    scores = np.empty((heads, rows, keys), np.int32)
    row_max = np.full((rows, heads), -np.inf, np.float32)
    for at, n, x, table in shares:
        native.share_scores_into(scores, at, n, c.q, by_head(x.k) if table is None else x.k_pages, table)
        native.share_maximum_into(row_max, scores, at, n, by_head(x.k_scale) if table is None else x.scale_pages, table)
    assert np.array_equal(scores, reference.share_scores(c.q, k))
    assert np.array_equal(row_max, reference.share_maximum(scores, k_scale))
    if keys == 0:
        return
    p = np.empty(scores.shape, np.uint16)
    sums = [np.zeros((rows, heads), np.int32) for _ in range(2)]
    pgs = [np.zeros((rows, heads, 2), np.uint64) for _ in range(3)]
    o = np.zeros((rows, heads, d), np.int64)
    for at, n, x, table in shares:
        piece = (by_head(x.k_scale), by_head(x.g), by_head(x.v))
        scale, gs, vs = piece if table is None else (x.scale_pages, x.g_pages, x.v_pages)
        native.share_weights_into(p, sums[0], pgs[0], scores, at, n, c.q_scale, scale, row_max, gs, table)
        native.share_weights_into(None, sums[1], pgs[1], scores, at, n, c.q_scale, scale, row_max, gs, table)
        native.share_projection_into(pgs[2], p, at, n, gs, table)
        native.share_outputs_into(o, p, at, n, vs, table)
    expected = reference.share_weights(scores, c.q_scale, k_scale, row_max)
    assert np.array_equal(p, expected)
    for row_sum in sums:
        assert np.array_equal(row_sum, reference.share_sums(expected))
    for pg in pgs:
        assert np.array_equal(pg, reference.share_projection(expected, g))
    assert np.array_equal(o, reference.share_outputs(expected, v))


@EXACT
@given(**(SIZES | {"keys": st.integers(0, 600), "rows": st.integers(1, 40)}))
def test_tail(isa: str, seed: int, rows: int, kv_heads: int, group: int, d: int, keys: int) -> None:
    c = Case(seed, rows, kv_heads, group, d, 0, 3)
    maximum = native.tail_maximum(c.q, c.k_pages, c.scale_pages, c.table, keys)
    assert np.array_equal(maximum, reference.tail_maximum(c.q, c.k_pages, c.scale_pages, c.table, keys))
    for m in (maximum, maximum + np.float32(300)):
        args = (c.q, c.q_scale, c.k_pages, c.scale_pages, c.v_pages, c.table, keys, m)
        for got, expected in zip(native.tail_attention(*args), reference.tail_attention(*args), strict=True):
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("keys", [131_072])
def test_the_longest_context(isa: str, keys: int) -> None:
    """131,072 keys that all weigh the most: L and O at their bounds, the same in one piece and in two shares."""
    d, heads = 16, 2
    q, k = np.full((1, heads, d), 127, np.int8), np.full((keys, 1, d), 127, np.int8)
    v = np.full((keys, 1, d), -127, np.int8)
    q_scale, k_scale = np.full((1, heads), 1e-3, np.float32), np.ones((keys, 1), np.float32)
    g = np.full((keys, 1, 2), P - 1, np.uint64)
    scores = scores_of(q, k)
    row_max = maximum_of(scores, k_scale)
    p = np.empty(scores.shape, np.uint16)
    row_sum, pg = np.zeros((1, heads), np.int32), np.zeros((1, heads, 2), np.uint64)
    native.share_weights_into(p, row_sum, pg, scores, 0, keys, q_scale, by_head(k_scale), row_max, by_head(g))
    assert np.all(p == 16336) and np.all(row_sum == 16336 * keys) and 16336 * keys < 2**31
    o = outputs_of(p, v)
    assert np.all(o == -16336 * 127 * keys) and 16336 * 127 * keys < 2**38
    # P.g with g = -1: minus the row sum, mod p.
    assert np.all(pg == np.uint64(P - 16336 * keys))
    whole = attention_contiguous(q, q_scale, k, k_scale, v, keys - 1)
    assert np.array_equal(o, whole[0]) and np.array_equal(row_sum, whole[1])
    # The same with half of the keys as the verifier's share.
    half = keys // 2
    pages = (
        k[half:].reshape(-1, PAGE, 1, d).swapaxes(1, 2).copy(),
        v[half:].reshape(-1, PAGE, 1, d).swapaxes(1, 2).copy(),
    )
    scales, table = np.ones((half // PAGE, 1, PAGE), np.float32), np.arange(half // PAGE, dtype=np.int32)
    assert np.array_equal(native.tail_maximum(q, pages[0], scales, table, half - 1), row_max)
    theirs, their_sum = native.tail_attention(q, q_scale, pages[0], scales, pages[1], table, half - 1, row_max)
    assert np.array_equal(theirs + outputs_of(np.ascontiguousarray(p[:, :, :half]), v[:half]), o)
    assert np.array_equal(their_sum * 2, row_sum)


def test_what_does_not_fit_is_refused(isa: str) -> None:
    c = Case(1, 2, 2, 2, 16, 300, 2)
    scores, k_scale = scores_of(c.q, c.k), by_head(c.k_scale)
    row_max, row_sum = maximum_of(scores, c.k_scale), np.zeros((2, 4), np.int32)
    with pytest.raises(InternalError):
        native.share_maximum_into(row_max, scores, 1, 300, k_scale)
    with pytest.raises(InternalError):
        native.share_maximum_into(row_max, scores, 0, 300, k_scale[:, :299].copy())
    with pytest.raises(InternalError):
        native.share_scores_into(scores, 0, 300, c.q, c.k_pages, np.array([0, 2], np.int32))
    with pytest.raises(InternalError):
        native.share_scores_into(scores, 0, 300, c.q, c.k_pages, np.array([0], np.int32))
    with pytest.raises(InternalError):
        native.share_weights_into(None, row_sum, None, scores, 0, 300, c.q_scale, k_scale, row_max, by_head(c.g))
    with pytest.raises(InternalError):
        native.tail_attention(c.q, c.q_scale, c.k_pages, c.scale_pages, c.v_pages, c.table, 9, row_max[:1].copy())
