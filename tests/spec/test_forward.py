"""The forward pass: against the specification in plain Python, and the same bits however the work is cut up."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.helpers import ARCHITECTURES, LocalModel, tiny_config, tiny_tensors
from tests.spec import oracle

from veriattn.errors import InternalError, NumericsError
from veriattn.native import kernels as native_kernels
from veriattn.spec.forward import AttentionInput, Batch, BatchEntry, check_batch
from veriattn.spec.kv import PAGE
from veriattn.spec.local import LocalOperations

IDS = [5, 9, 30, 7, 7, 36, 0, 12, 4, 21, 17, 5]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_as_specified(kernels: ModuleType, architecture: str, seed: int) -> None:
    config = tiny_config(**ARCHITECTURES[architecture])
    tensors = tiny_tensors(config, seed)
    model = oracle.Model(
        config, {n: t.astype(np.float64 if t.dtype.kind == "f" else int).tolist() for n, t in tensors.items()}
    )
    expected = np.array([model.token(t) for t in IDS[:4]], np.float32)
    found = LocalModel(config, tensors, kernels).run(IDS[:4])
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_switches_matter(architecture: str) -> None:
    """Each optional tensor changes the logits, so that none is ignored by both sides alike."""
    config = tiny_config(**ARCHITECTURES[architecture])
    tensors = tiny_tensors(config)
    expected = LocalModel(config, tensors).run(IDS)
    for name in tensors:
        if name.endswith(("bias", "_norm", "v_scale", "rope.cos", "rope.sin")) or (
            # Softmax does not see a constant added to all keys but through the rounding of k.
            name.endswith("k_center")
        ):
            changed = dict(tensors)
            changed[name] = (tensors[name] * np.float32(1.5)).astype(np.float32)
            assert LocalModel(config, changed).run(IDS).tobytes() != expected.tobytes(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batches_chunks_and_order_change_no_bit(kernels: ModuleType, architecture: str, data: st.DataObject) -> None:
    model = LocalModel.tiny(kernels=kernels, **ARCHITECTURES[architecture])
    vocab = model.config.vocab_size
    lists = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9)
    sequences = data.draw(st.lists(lists, min_size=1, max_size=4))
    alone = [model.run(ids) for ids in sequences]
    rows: list[list[Any]] = [[] for _ in sequences]
    while any(len(r) < len(s) for r, s in zip(rows, sequences, strict=True)):
        unfinished = [i for i, s in enumerate(sequences) if len(rows[i]) < len(s)]
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        entries = []
        for i in chosen:
            start = len(rows[i])
            n = data.draw(st.integers(1, len(sequences[i]) - start))
            entries.append(BatchEntry(100 + i, start, tuple(sequences[i][start : start + n]), "all"))
        logits, at = model.step(*entries), 0
        for i, e in zip(chosen, entries, strict=True):
            rows[i].extend(logits[at : at + e.num_tokens])
            at += e.num_tokens
        assert at == len(logits)
    for found, expected in zip(rows, alone, strict=True):
        assert np.array(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("architecture", ["llama", "odd_everything"])
def test_chunks_over_pages_change_no_bit(kernels: ModuleType, architecture: str) -> None:
    model = LocalModel.tiny(kernels=kernels, **ARCHITECTURES[architecture])
    ids = [(i * i + 3) % 37 for i in range(PAGE + 40)]
    whole = model.run(ids)
    assert model.run(ids, [PAGE - 1, 1, 1, 39]).tobytes() == whole.tobytes()
    assert model.run(ids, [17] * 17 + [7]).tobytes() == whole.tobytes()
    # The last row depends on the first token, over a page boundary.
    assert model.run([ids[0] + 1, *ids[1:]])[-1].tobytes() != whole[-1].tobytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_threads_change_no_bit(architecture: str) -> None:
    model = LocalModel.tiny(kernels=native_kernels, **ARCHITECTURES[architecture])
    before, results = native_kernels.get_threads(), set()
    try:
        for threads in (1, 2, 5):
            native_kernels.set_threads(threads)
            results.add(model.run(IDS * 3).tobytes())
    finally:
        native_kernels.set_threads(before)
    assert len(results) == 1


def test_which_rows_have_logits() -> None:
    model = LocalModel.tiny()
    ids = tuple(IDS)
    every = model.run(IDS)
    assert model.step(BatchEntry(0, 0, ids, "none")).shape == (0, model.config.vocab_size)
    found = model.step(
        BatchEntry(1, 0, ids, "last"), BatchEntry(2, 0, ids[:3], "none"), BatchEntry(3, 0, ids[:2], "all")
    )
    assert found.tobytes() == np.concatenate([every[-1:], every[:2]]).tobytes()


def test_a_freed_sequence_leaves_nothing_behind() -> None:
    model = LocalModel.tiny()
    first = model.run(IDS)
    model.step(BatchEntry(0, 0, (1, 2, 3)))
    assert model.ops.length(0) == 3
    model.ops.free(0)
    assert model.ops.length(0) == 0
    assert model.run(IDS).tobytes() == first.tobytes()


def random_inputs(config: Any, tokens: int) -> AttentionInput:
    rng = np.random.default_rng(tokens)
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim

    def ints(n: int) -> Any:
        return rng.integers(-127, 128, (tokens, n, d), dtype=np.int8)

    def scales(n: int) -> Any:
        return rng.uniform(0.001, 0.03, (tokens, n)).astype(np.float32)

    return AttentionInput(ints(heads), scales(heads), ints(kv_heads), scales(kv_heads), ints(kv_heads))


@pytest.mark.parametrize("architecture", ["llama", "odd", "odd_everything"])
def test_attention_in_parts_is_attention(kernels: ModuleType, architecture: str) -> None:
    """By heads, and as scores, weights and weighted values: the operations that other strategies are made of."""
    config = tiny_config(**ARCHITECTURES[architecture])
    ops = LocalOperations(config, dict.__getitem__, kernels)
    group, start = config.num_heads // config.num_kv_heads, 0
    for tokens in (PAGE - 1, 3):
        x = random_inputs(config, tokens)
        o, row_sum = ops.attention(0, Batch((BatchEntry(5, start, (1,) * tokens),)), x)
        for kv in range(config.num_kv_heads):
            kv_heads, heads = range(kv, kv + 1), slice(kv * group, (kv + 1) * group)
            one = slice(kv, kv + 1)
            ops.append(1, 5, start, kv_heads, x.k_i8[:, one], x.k_scale[:, one], x.v_i8[:, one])
            q, q_scale = x.q_i8[:, heads], x.q_scale[:, heads]
            o_head, row_sum_head = ops.attend(1, 5, start, kv_heads, q, q_scale)
            assert np.array_equal(o_head, o[:, heads]) and np.array_equal(row_sum_head, row_sum[:, heads])
        scores = ops.scores(0, 5, x.q_i8, start + tokens)
        keys = ops.gather(0, 5, "k").astype(np.int64)
        assert scores[1, 2].tolist() == (keys[:, 1 // group] @ x.q_i8[2, 1].astype(np.int64)).tolist()
        scale_pages = np.zeros((2, config.num_kv_heads, PAGE), np.float32)
        k_scale = ops.gather(0, 5, "k_scale")
        for at in range(0, len(k_scale), PAGE):
            part = k_scale[at : at + PAGE].T
            scale_pages[at // PAGE, :, : part.shape[1]] = part
        p = kernels.attention_weights_paged(scores, x.q_scale, scale_pages, np.array([0, 1], np.int32), start)
        assert np.array_equal(p.sum(axis=2, dtype=np.int64).T, row_sum)
        assert np.array_equal(ops.weighted_values(0, 5, p), o)
        start += tokens


@pytest.mark.parametrize("name", ["embed", "layers.0.o.scale", "layers.1.down.scale"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**60])
def test_values_outside_the_domain_are_an_error(kernels: ModuleType, name: str, bad: float) -> None:
    """A loader refuses such tensors; the function names the error all the same."""
    config = tiny_config()
    tensors = tiny_tensors(config)
    damaged = tensors[name].copy()
    with np.errstate(over="ignore"):
        damaged[7] = bad
    model = LocalModel(config, tensors | {name: damaged}, kernels)
    with pytest.raises(NumericsError):
        model.run([5, 7])


@pytest.mark.parametrize(
    "entries",
    [(), (BatchEntry(0, 0, ()),), (BatchEntry(0, -1, (1,)),), (BatchEntry(0, 0, (1,)), BatchEntry(0, 1, (1,)))],
)
def test_batches_that_make_no_sense(entries: tuple[BatchEntry, ...]) -> None:
    with pytest.raises(InternalError):
        Batch(entries)


@pytest.mark.parametrize(
    ("entry", "length"),
    [
        (BatchEntry(0, 1, (1,)), 0),
        (BatchEntry(0, 0, (1,)), 1),
        (BatchEntry(0, 1023, (1, 2)), 1023),
        (BatchEntry(0, 0, (-1,)), 0),
        (BatchEntry(0, 0, (1, 300)), 0),
    ],
)
def test_batches_that_the_model_cannot_run(entry: BatchEntry, length: int) -> None:
    model = LocalModel.tiny()
    check_batch(model.tensors, Batch((BatchEntry(0, 1023, (299,)),)), [1023])
    with pytest.raises(InternalError):
        check_batch(model.tensors, Batch((entry,)), [length])
