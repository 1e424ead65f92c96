"""Cuts of attention: the paper's defaults, and the choice from measured times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veriattn.verifier import tiling
from veriattn.verifier.tiling import AutoTiling, Tiling, candidates, next_tiling


def test_defaults() -> None:
    assert Tiling.default(1024, 512) == Tiling(2, 16)
    assert Tiling.default(1025, 512) == Tiling.default(3072, 16) == Tiling(4, 32)
    assert Tiling.default(3073, 512) == Tiling(8, 32)
    assert Tiling.default(3073, 15) == Tiling(1, 1)  # decode


@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 600), st.booleans())
def test_blocks_and_tiles_cover_everything_once(blocks: int, kv_heads: int, tokens: int, pipeline: bool) -> None:
    tiling = Tiling(blocks, blocks, pipeline)
    cut = tiling.kv_blocks(kv_heads)
    assert [kv for block in cut for kv in block] == list(range(kv_heads))
    assert len(cut) == (min(blocks, kv_heads) if pipeline else 1)
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    rows = tiling.tile_rows(tokens)
    assert 1 <= rows <= tokens
    assert -(-tokens // rows) <= (blocks if pipeline else 1)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=5), st.integers(1, 9))
def test_requests_for_scores_cover_every_row_once_and_stay_small(runs: list[tuple[int, int]], heads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "SCORE_BYTES", 50_000)
        groups = tiling.score_groups(runs, heads)
    pieces = [piece for group in groups for piece in group]
    rows = [(i, at + j) for i, at, n in pieces for j in range(n)]
    assert rows == [(i, j) for i, (_, tokens) in enumerate(runs) for j in range(tokens)]
    for group in groups:
        assert len({i for i, _, _ in group}) == len(group)
        sizes = [4 * heads * n * (runs[i][0] + at + n) for i, at, n in group]
        assert sum(sizes) <= 50_000 or [n for _, _, n in group] == [1]


def test_what_fits_goes_in_one_request() -> None:
    assert tiling.score_groups([(9, 1), (500, 1), (0, 64)], 8) == [[(0, 0, 1), (1, 0, 1), (2, 0, 64)]]


@given(st.integers(1, 64), st.integers(16, 600))
def test_candidates_fit(kv_heads: int, rows: int) -> None:
    cuts = candidates(kv_heads, rows)
    assert cuts[0] == Tiling(1, 1)
    assert len(set(cuts)) == len(cuts)
    assert all(len(t.kv_blocks(kv_heads)) == t.head_blocks and t.tile_rows(rows) >= 1 for t in cuts)


def test_each_is_tried_then_the_best_again() -> None:
    a, b, c, d = candidates(1, 16)
    measured: dict[Tiling, list[float]] = {a: [], b: [], c: [], d: []}
    seconds = {a: 5.0, b: 2.0, c: 9.0, d: 1.5}
    order = []
    for _ in range(10):
        order.append(next_tiling(measured))
        measured[order[-1]].append(seconds[order[-1]])
    assert order[:4] == [a, b, c, d]
    assert order[4:10] == [d, d, b, b, a, a]
    assert next_tiling(measured) == d
    measured[b].append(1.0)  # one slow layer does not condemn a cut
    assert next_tiling(measured) == b


def test_of_equals_the_coarser() -> None:
    cuts = candidates(2, 16)
    assert next_tiling({t: [1.0] * 3 for t in cuts}) == Tiling(1, 1)
    with pytest.raises(ValueError):
        next_tiling({})


def test_auto() -> None:
    auto = AutoTiling()
    assert auto.next(2000, 1, 8) == Tiling(1, 1)
    auto.took(Tiling(1, 1), 1, 1.0)

    def settle(keys: int, rows: int, best: Tiling) -> None:
        for _ in range(40):
            tiling = auto.next(keys, rows, 8)
            auto.took(tiling, rows, 1.0 if tiling == best else 2.0)
        assert auto.next(keys, rows, 8) == best

    settle(1024, 512, Tiling(4, 16))
    assert auto.next(512, 256, 8) == Tiling(4, 16)
    assert auto.next(2048, 512, 8) == Tiling(4, 16)
    assert auto.next(2049, 512, 8) == Tiling(1, 1)  # another shape: measured anew
    settle(4096, 512, Tiling(8, 32))
    assert sum(map(len, auto._measured.values())) <= 40  # does not grow with the session
