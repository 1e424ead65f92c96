"""Whole layers over claims, at random: sequences that come and go over the ends of pages, odd shapes, one wrong value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.helpers import ARCHITECTURES, LocalModel, public_tensors, tiny_config, tiny_tensors
from tests.native.test_layers import FakeChannel, Recording, SingleOperations, make_keys

from veriattn.errors import AttentionMismatch, FreivaldsMismatch, VeriattnError
from veriattn.native import kernels
from veriattn.spec.field import P
from veriattn.spec.forward import Batch, BatchEntry, forward
from veriattn.verifier.checks import CheckCounts, ClaimChecker, RunAheadOperations
from veriattn.wire.messages import AttentionCheck

Array = np.ndarray[Any, Any]

SHAPES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "one group, odd everything": {
        "num_heads": 7, "num_kv_heads": 1, "head_dim": 20, "rotary_dim": 2, "hidden_size": 33, "intermediate_size": 17,
    },
    "one of each": {
        "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "hidden_size": 1, "intermediate_size": 1, "vocab_size": 31,
    },
    "the widest head": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256, "rotary_dim": 128, "qk_norm": True},
    "large groups": {
        "num_heads": 32, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 4, "k_center": True, "qkv_bias": True,
    },
}  # fmt: skip
WAYS = (RunAheadOperations, SingleOperations)


def random_batch(rng: np.random.Generator, lengths: dict[int, int], vocabulary: int) -> Batch:
    """Some of six sequences, each with a few tokens more; now and then a new one begins just below the end of a page."""
    entries = []
    for seq_id in rng.permutation(6)[: rng.integers(1, 5)].tolist():
        start = lengths.get(seq_id, 0)
        count = int(rng.integers(240, 262) if start == 0 and rng.random() < 0.1 else rng.integers(1, 12))
        ids = tuple(rng.integers(0, vocabulary, count).tolist())
        entries.append(BatchEntry(seq_id, start, ids, ("none", "last", "all")[rng.integers(3)]))
    return Batch(tuple(entries))


def one_wrong(rng: np.random.Generator, claims: list[Array]) -> None:
    """Alter one element of one claim: by a little, to the ends of its type, by multiples of the prime."""
    flat = claims[int(rng.choice([i for i, c in enumerate(claims) if c.size]))].reshape(-1)
    at = int(rng.integers(flat.size))
    old, info = int(flat[at]), np.iinfo(flat.dtype)
    values = [old ^ 1, old ^ (1 << 20), info.min, info.max]
    if flat.dtype == np.int64:
        values += [old + P, old - P, old + (P << 12), (1 << 39) - 1, 1 << 39, -(1 << 39), 1 - (1 << 39)]
    flat[at] = next(v for v in (values[rng.integers(len(values))], old ^ 1) if v != old)


@pytest.mark.parametrize("name", SHAPES)
def test_honest_steps_pass_and_one_wrong_value_never_does(name: str, isa: str) -> None:
    config = tiny_config(**SHAPES[name])
    tensors = tiny_tensors(config)
    public, keys, rng = public_tensors(config, tensors), make_keys(config, tensors), np.random.default_rng(len(name))
    for _ in range(3):
        local, lengths = LocalModel(config, tensors, kernels), {}  # type: ignore[var-annotated]
        checkers = [ClaimChecker(config, keys, False, CheckCounts()) for _ in WAYS]
        channels = [FakeChannel([]) for _ in WAYS]
        ways = [w(c, ch, AttentionCheck.REPLAY) for w, c, ch in zip(WAYS, checkers, channels, strict=True)]  # type: ignore[arg-type]
        for step in range(5):
            for gone in [s for s in lengths if rng.random() < 0.2]:
                del lengths[gone]
                for cache in (local.ops, *(c.cache for c in checkers)):
                    cache.free(gone)  # type: ignore[attr-defined]
            batch, recording = random_batch(rng, lengths, config.vocab_size), Recording(local.ops)
            logits = forward(public, batch, recording, kernels)
            claims = [c.copy() for c in recording.claims]
            if step == 4:
                one_wrong(rng, claims)
            results: list[Any] = []
            for ops, channel in zip(ways, channels, strict=True):
                channel.claims = [c.copy() for c in claims]
                try:
                    results.append(forward(public, batch, ops, kernels))
                except VeriattnError as e:
                    results.append(e)
            if step == 4:
                assert isinstance(results[0], FreivaldsMismatch | AttentionMismatch)
                assert str(results[0]) == str(results[1])
                assert vars(results[0]) == vars(results[1])
                continue
            assert all(np.array_equal(r, logits) for r in results)
            lengths |= {e.seq_id: e.start + e.num_tokens for e in batch.entries}
            for i in range(config.num_layers):
                for field in ("k", "k_scale", "g"):
                    for seq_id in lengths:
                        a, b = (c.cache.layer(i).gather(seq_id, field) for c in checkers)
                        assert np.array_equal(a, b)
