"""Attention over the longest context with the largest weights, values and challenges: no sum may wrap."""

from __future__ import annotations

import numpy as np
import pytest

from veriattn.native import attention, attention_replay, attention_transfer
from veriattn.spec.constants import MAX_KEYS
from veriattn.spec.field import P
from veriattn.spec.kv import PAGE

WEIGHT = 16336  # of a key that scores as high as any


@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (3, 2), (16, 1)])
def test_the_longest_context_with_everything_at_its_largest(isa: str, heads: int, tokens: int) -> None:
    d, pages, start = 8, MAX_KEYS // PAGE, MAX_KEYS - tokens
    keys = start + 1 + np.arange(tokens, dtype=np.int64)[:, None]
    q, q_scale = np.zeros((tokens, heads, d), np.int8), np.ones((tokens, heads), np.float32)
    k, k_scale = np.zeros((pages, 1, PAGE, d), np.int8), np.ones((pages, 1, PAGE), np.float32)
    g, table = np.full((pages, 1, PAGE, 2), P - 1, np.uint64), np.arange(pages, dtype=np.int32)
    row_sum, pg = attention_replay(q, q_scale, k, k_scale, g, table, start)
    assert np.array_equal(row_sum, np.broadcast_to(WEIGHT * keys, (tokens, heads)))
    assert np.array_equal(pg, np.broadcast_to((P - WEIGHT * keys)[..., None].astype(np.uint64), pg.shape))
    for value in (127, -127):
        v = np.full((pages, 1, PAGE, d), value, np.int8)
        o, sums = attention(q, q_scale, k, k_scale, v, table, start)
        assert np.array_equal(sums, row_sum)
        assert np.array_equal(o, np.broadcast_to((WEIGHT * value * keys)[..., None], o.shape))

    def transfer(score: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = np.full((heads, tokens, MAX_KEYS), score, np.int32)
        own, before = np.zeros((tokens, 1, d), np.int8), np.zeros((1, 2, d), np.uint64)
        r = np.full((2, MAX_KEYS), P - 1, np.uint64)
        return attention_transfer(scores, q, q_scale, own, before, r, k_scale, g, table, start)

    ok, sums, projected = transfer(0)
    assert ok.all()
    assert np.array_equal(sums, row_sum)
    assert np.array_equal(projected, pg)
    for wrong in (1, -1, 2**31 - 1, -(2**31)):
        assert not transfer(wrong)[0].any()
