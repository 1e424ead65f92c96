"""The paged cache beside a plain dictionary of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from veriattn.errors import InternalError
from veriattn.spec.kv import PAGE, PagedCache, attention_cache
from veriattn.spec.reference import gather_pages

KV_HEADS, DIM, MAX_PAGES = 2, 3, 12


def values(seed: int, n: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "k": rng.integers(-127, 128, (n, KV_HEADS, DIM), dtype=np.int8),
        "k_scale": rng.uniform(1, 2, (n, KV_HEADS)).astype(np.float32),
        "v": rng.integers(-127, 128, (n, KV_HEADS, DIM), dtype=np.int8),
    }


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = attention_cache(KV_HEADS, DIM, MAX_PAGES)
        self.plain: dict[int, dict[str, Any]] = {}
        self.count = 0

    @rule(seq=st.integers(0, 4), n=st.sampled_from([1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]))
    def append(self, seq: int, n: int) -> None:
        start = self.cache.length(seq)
        lengths = {s: len(v["k"]) for s, v in self.plain.items()} | {seq: start + n}
        if sum(-(-length // PAGE) for length in lengths.values()) > MAX_PAGES:
            return
        self.count += 1
        new = values(self.count, n)
        self.cache.extend(seq, n)
        self.cache.write(seq, start, **new)
        old = self.plain.get(seq, {name: v[:0] for name, v in new.items()})
        self.plain[seq] = {name: np.concatenate([old[name], v]) for name, v in new.items()}

    @rule(seq=st.integers(0, 4))
    def free(self, seq: int) -> None:
        self.cache.free(seq)
        self.plain.pop(seq, None)

    @invariant()
    def same(self) -> None:
        assert sorted(self.cache.sequences()) == sorted(self.plain)
        tables = [p for s in self.plain for p in self.cache.table(s).tolist()]
        assert len(tables) == len(set(tables)) <= MAX_PAGES
        for seq, expected in self.plain.items():
            assert self.cache.length(seq) == len(expected["k"])
            for name, v in expected.items():
                assert self.cache.gather(seq, name).tobytes() == v.tobytes()
                pages = gather_pages(self.cache.arrays[name], self.cache.table(seq), len(v))
                assert pages.tobytes() == v.tobytes()
        free = set(range(self.cache.arrays["k"].shape[0])) - set(tables)
        for array in self.cache.arrays.values():
            assert not array[sorted(free)].any()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def small() -> PagedCache:
    return attention_cache(KV_HEADS, DIM, 2)


def test_a_full_cache_says_so() -> None:
    cache = small()
    cache.extend(0, 2 * PAGE)
    with pytest.raises(InternalError, match="full"):
        cache.extend(1, 1)
    cache.free(0)
    cache.extend(1, 1)
    assert cache.length(0) == 0 and cache.table(0).tolist() == []


def test_a_write_beyond_the_length_is_refused() -> None:
    cache = small()
    cache.extend(0, 3)
    cache.write(0, 1, **values(0, 2))
    with pytest.raises(InternalError):
        cache.write(0, 2, **values(0, 2))


def test_unknown_sequences_are_empty() -> None:
    cache = small()
    cache.free(7)
    assert cache.length(7) == 0 and cache.sequences() == [] and cache.nbytes == 0
