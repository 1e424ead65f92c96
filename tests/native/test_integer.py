"""Integer and field kernels against the exact references, on every instruction set."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veriattn.errors import ConfigError, InternalError
from veriattn.native import kernels
from veriattn.spec import field, reference
from veriattn.spec.field import P
from veriattn.spec.kv import PAGE

EXACT = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32 - 1)


def int8s(rng: np.random.Generator, *shape: int) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 1:
        return rng.choice(np.array([-127, 127], np.int8), shape)
    if kind == 2:
        return np.full(shape, rng.choice(np.array([-128, -127, 127], np.int8)), np.int8)
    return rng.integers(-127, 128, shape, dtype=np.int8)


def elements(rng: np.random.Generator, *shape: int) -> np.ndarray:
    kind = rng.integers(4)
    if kind == 1:
        return np.full(shape, P - 1, np.uint64)
    if kind == 2:
        return rng.choice(np.array([0, 1, P - 1, P - 2, 2**49, 2**26 - 1, 2**25], np.uint64), shape)
    return rng.integers(0, P, shape, dtype=np.uint64)


# --- gemm -------------------------------------------------------------------------------------------------------------


@EXACT
@given(seed=SEEDS, m=st.integers(0, 40), n=st.integers(1, 200), k=st.integers(1, 300))
def test_gemm(isa: str, seed: int, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    a, w = int8s(rng, m, k), int8s(rng, n, k)
    expected = reference.gemm_i8(a, w)
    assert np.array_equal(kernels.gemm_i8(a, w), expected)
    packed = kernels.pack(w)
    assert packed.shape == (n, k)
    assert np.array_equal(kernels.gemm_packed(packed, a), expected)


@pytest.mark.parametrize("m", [1, 7, 33])
@pytest.mark.parametrize(("n", "k"), [(576, 576), (960, 576), (130, 1536), (64, 4099), (3, 131_071)])
def test_gemm_model_shapes(isa: str, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m)
    a, w = rng.integers(-127, 128, (m, k), dtype=np.int8), rng.integers(-127, 128, (n, k), dtype=np.int8)
    assert np.array_equal(kernels.gemm_packed(kernels.pack(w), a), reference.gemm_i8(a, w))


@pytest.mark.parametrize("sign", [1, -1])
def test_gemm_at_the_bound_of_int32(isa: str, sign: int) -> None:
    a, w = np.full((2, 131_071), 127, np.int8), np.full((17, 131_071), sign * 127, np.int8)
    assert np.all(kernels.gemm_packed(kernels.pack(w), a) == sign * 127 * 127 * 131_071)
    with pytest.raises(InternalError):
        kernels.pack(np.zeros((1, 131_072), np.int8))


def test_gemm_does_not_depend_on_threads(isa: str) -> None:
    rng = np.random.default_rng(3)
    a, w = int8s(rng, 100, 320), int8s(rng, 777, 320)
    packed, before = kernels.pack(w), kernels.get_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            kernels.set_threads(threads)
            results.append(kernels.gemm_packed(packed, a))
    finally:
        kernels.set_threads(before)
    assert all(np.array_equal(r, reference.gemm_i8(a, w)) for r in results)


def test_concurrent_callers(isa: str) -> None:
    rng = np.random.default_rng(4)
    a, w = int8s(rng, 64, 512), int8s(rng, 512, 512)
    packed, expected, wrong = kernels.pack(w), reference.gemm_i8(a, w), []

    def run() -> None:
        for _ in range(20):
            if not np.array_equal(kernels.gemm_packed(packed, a), expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- field ------------------------------------------------------------------------------------------------------------


@EXACT
@given(seed=SEEDS, tokens=st.integers(0, 12), n=st.integers(1, 150), k=st.integers(1, 200))
def test_linear_check_and_projection(isa: str, seed: int, tokens: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    a, w, r = int8s(rng, tokens, k), int8s(rng, n, k), elements(rng, 2, n)
    u = np.zeros((2, k), np.uint64)
    split = int(rng.integers(0, n + 1))
    for rows in (slice(0, split), slice(split, n)):
        kernels.project_weights(np.ascontiguousarray(w[rows]), np.ascontiguousarray(r[:, rows]), u)
    expected = np.zeros_like(u)
    field.project_weights(w, r, expected)
    assert np.array_equal(u, expected)
    y = reference.gemm_i8(a, w)
    out = np.empty_like(y)
    assert np.all(kernels.linear_check(y, r, a, u) == 1)
    assert np.all(kernels.linear_check(y, r, a, u, out) == 1)
    assert np.array_equal(out, y)
    if tokens:
        t, j = int(rng.integers(tokens)), int(rng.integers(n))
        y[t, j] ^= np.int32(1 << int(rng.integers(31)))
        got = kernels.linear_check(y, r, a, u)
        assert np.array_equal(got, field.linear_check(y, r, a, u))
        assert got[t] == (0 if np.any(r[:, j]) else 1)


@EXACT
@given(seed=SEEDS, tokens=st.integers(1, 20), n=st.sampled_from([1, 7, 16, 31, 64, 129, 1000]))
def test_linear_check_of_arbitrary_claims(isa: str, seed: int, tokens: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.choice(np.array([0, -1, 1, -(2**31), 2**31 - 1, 12345], np.int32), (tokens, n))
    r = elements(rng, 2, n)
    # a = (1), u = y[0].r: exactly the rows that agree with row 0 pass.
    u = field._dot(r, y[0][:, None])
    a = np.ones((tokens, 1), np.int8)
    got = kernels.linear_check(y, r, a, u)
    assert got[0] == 1
    assert np.array_equal(got, field.linear_check(y, r, a, u))


@pytest.mark.parametrize("value", [-(2**31), 2**31 - 1])
def test_linear_check_long_rows_do_not_overflow(isa: str, value: int) -> None:
    n, k = 150_000, 131_071
    y, r = np.full((2, n), value, np.int32), np.full((2, n), P - 1, np.uint64)
    a, u = np.full((2, k), -127, np.int8), np.full((2, k), P - 1, np.uint64)
    left, right = value * (P - 1) * n % P, -127 * (P - 1) * k % P
    u[:, 0] = (int(u[0, 0]) + (left - right) * pow(-127, -1, P)) % P
    assert kernels.linear_check(y, r, a, u).tolist() == [1, 1]
    y[1, n - 1] ^= 1
    assert kernels.linear_check(y, r, a, u).tolist() == [1, 0]


def test_error_in_one_repetition_only_is_found(isa: str) -> None:
    rng = np.random.default_rng(8)
    a, w, r = int8s(rng, 9, 70), int8s(rng, 50, 70), rng.integers(1, P, (2, 50), dtype=np.uint64)
    u = np.zeros((2, 70), np.uint64)
    kernels.project_weights(w, r, u)
    y = reference.gemm_i8(a, w)
    for rep in (0, 1):
        bad = u.copy()
        bad[rep, 5] = (bad[rep, 5] + np.uint64(1)) % np.uint64(P)
        assert np.array_equal(kernels.linear_check(y, r, a, bad), (a[:, 5] == 0).astype(np.uint8))


@EXACT
@given(seed=SEEDS, tokens=st.integers(0, 20), kv=st.integers(1, 3), group=st.integers(1, 3), d=st.integers(1, 130))
def test_value_key_and_output_projections(isa: str, seed: int, tokens: int, kv: int, group: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    v, w = int8s(rng, tokens, kv, d), elements(rng, kv, 2, d)
    if tokens:
        assert np.array_equal(kernels.value_projection(v, w), field.value_projection(v, w))
        edges = np.array([2**39 - 1, -(2**39) + 1, 0, -1, 2**38, 12345678901], np.int64)
        o = rng.choice(edges, (tokens, kv * group, d))
        got, ok = kernels.project_outputs(o, w)
        expected, expected_ok = field.project_outputs(o, w)
        assert ok and expected_ok and np.array_equal(got, expected)
        for bad in (2**39, -(2**39), 2**63 - 1, -(2**63)):
            o.flat[int(rng.integers(o.size))] = bad
            assert kernels.project_outputs(o, w)[1] is False
            o[...] = 0
    r, c = elements(rng, 2, tokens + 5), elements(rng, kv, 2, d)
    expected_c = c.copy()
    kernels.key_projection(v, r, 3, c)
    field.key_projection(v, r, 3, expected_c)
    assert np.array_equal(c, expected_c)


# --- attention --------------------------------------------------------------------------------------------------------


def cache(rng: np.random.Generator, keys: int, kv: int, d: int) -> tuple[np.ndarray, ...]:
    """Keys, scales, values, projections and the pages that hold them in a shuffled order, junk elsewhere."""
    used = -(-keys // PAGE)
    pages = used + 2
    table = rng.permutation(pages)[:used].astype(np.int32)
    k_pages, v_pages = int8s(rng, pages, kv, PAGE, d), int8s(rng, pages, kv, PAGE, d)
    scale = (2.0 ** rng.uniform(-18, 0, (pages, kv, PAGE))).astype(np.float32)
    if rng.integers(3) == 0:
        scale[...] = 2.0**-7
    return table, k_pages, scale, v_pages, elements(rng, pages, kv, PAGE, 2)


ATTENTION = given(
    seed=SEEDS, tokens=st.one_of(st.integers(1, 4), st.integers(1, 70)),
    start=st.sampled_from([0, 1, 5, 250, 255, 256, 300, 511]),
    kv=st.integers(1, 2), group=st.sampled_from([1, 2, 3, 8, 20]), d=st.sampled_from([3, 4, 8, 20, 64, 80, 128, 200, 256, 260]),
)  # fmt: skip


@EXACT
@ATTENTION
def test_attention(isa: str, seed: int, tokens: int, start: int, kv: int, group: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    keys, heads = start + tokens, kv * group
    table, k_pages, k_scale, v_pages, g_pages = cache(rng, keys, kv, d)
    q = int8s(rng, tokens, heads, d)
    q_scale = (2.0 ** rng.uniform(-14, 2, (tokens, heads))).astype(np.float32)
    o, row_sum = reference.attention(q, q_scale, k_pages, k_scale, v_pages, table, start)
    got_o, got_l = kernels.attention(q, q_scale, k_pages, k_scale, v_pages, table, start)
    assert np.array_equal(got_l, row_sum)
    assert np.array_equal(got_o, o)
    got_l, got_pg = kernels.attention_replay(q, q_scale, k_pages, k_scale, g_pages, table, start)
    expected_l, expected_pg = field.attention_replay(q, q_scale, k_pages, k_scale, g_pages, table, start)
    assert np.array_equal(got_l, expected_l)
    assert np.array_equal(got_pg, expected_pg)


@settings(EXACT, max_examples=15)
@ATTENTION
def test_attention_transfer(isa: str, seed: int, tokens: int, start: int, kv: int, group: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = min(tokens, 9)
    keys, heads = start + tokens, kv * group
    table, k_pages, k_scale, _, g_pages = cache(rng, keys, kv, d)
    q = int8s(rng, tokens, heads, d)
    q_scale = (2.0 ** rng.uniform(-14, 2, (tokens, heads))).astype(np.float32)
    k = np.ascontiguousarray(reference.gather_pages(k_pages, table, keys))
    scores = np.stack([reference.gemm_i8(q[:, h], k[:, h // group]) for h in range(heads)])
    scores[:, np.arange(keys)[None, :] > (start + np.arange(tokens))[:, None]] = 77
    r, c = rng.integers(1, P, (2, keys + 3), dtype=np.uint64), np.zeros((kv, 2, d), np.uint64)
    kernels.key_projection(k[:start], r, 0, c)
    new = np.ascontiguousarray(k[start:])
    args = (q, q_scale, new, c, r, k_scale, g_pages, table, start)
    kept = c.copy()
    ok, row_sum, pg = kernels.attention_transfer(scores, *args)
    assert np.all(ok == 1) and np.array_equal(c, kept)
    expected_l, expected_pg = field.attention_replay(q, q_scale, k_pages, k_scale, g_pages, table, start)
    assert np.array_equal(row_sum, expected_l) and np.array_equal(pg, expected_pg)
    h, i = int(rng.integers(heads)), int(rng.integers(tokens))
    j = int(rng.integers(start + i + 1))
    scores[h, i, j] ^= np.int32(1 << int(rng.integers(31)))
    got = kernels.attention_transfer(scores, *args)
    expected = field.attention_transfer(scores, *args)
    assert all(np.array_equal(x, y) for x, y in zip(got, expected, strict=True))
    assert np.argwhere(got[0] == 0).tolist() == [[i, h]]


@EXACT
@ATTENTION
def test_softmax_and_products_apart(isa: str, seed: int, tokens: int, start: int, kv: int, group: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = min(tokens, 40)
    keys, heads = start + tokens, kv * group
    table, k_pages, k_scale, v_pages, _ = cache(rng, keys, kv, d)
    q = int8s(rng, tokens, heads, d)
    q_scale = (2.0 ** rng.uniform(-14, 2, (tokens, heads))).astype(np.float32)
    k = np.ascontiguousarray(reference.gather_pages(k_pages, table, keys))
    scores = np.stack([reference.gemm_i8(q[:, h], k[:, h // group]) for h in range(heads)])
    assert np.array_equal(kernels.attention_scores(q, k_pages, table, keys, range(kv)), scores)
    last = range(kv - 1, kv)  # the heads of one KV head alone
    some = kernels.attention_scores(np.ascontiguousarray(q[:, -group:]), k_pages, table, keys, last)
    assert np.array_equal(some, scores[-group:])
    assert np.array_equal(reference.attention_scores(q[:, -group:], k_pages, table, keys, last), some)
    p = kernels.attention_weights_paged(scores, q_scale, k_scale, table, start)
    assert np.array_equal(p, reference.attention_weights_paged(scores, q_scale, k_scale, table, start))
    o = kernels.weighted_values(p, v_pages, table)
    assert np.array_equal(o, reference.weighted_values(p, v_pages, table))
    assert np.array_equal(o, kernels.attention(q, q_scale, k_pages, k_scale, v_pages, table, start)[0])
    p.flat[-1] = 16385
    with pytest.raises(InternalError):
        kernels.weighted_values(p, v_pages, table)
    with pytest.raises(InternalError):
        kernels.attention_scores(q, k_pages, table, keys, range(1, kv + 1))


def test_attention_of_many_keys(isa: str) -> None:
    # Equal keys and the longest context: L, O and P.g at their bounds, every accumulator at its fullest.
    keys, d = 131_072, 16
    pages = keys // PAGE
    table = np.arange(pages, dtype=np.int32)[::-1].copy()
    k, v = np.ones((pages, 1, PAGE, d), np.int8), np.full((pages, 1, PAGE, d), -127, np.int8)
    scale, g = np.ones((pages, 1, PAGE), np.float32), np.full((pages, 1, PAGE, 2), P - 1, np.uint64)
    q, q_scale = np.ones((1, 2, d), np.int8), np.ones((1, 2), np.float32)
    o, row_sum = kernels.attention(q, q_scale, k, scale, v, table, keys - 1)
    assert np.all(row_sum == 16336 * keys) and np.all(o == -127 * 16336 * keys)
    row_sum, pg = kernels.attention_replay(q, q_scale, k, scale, g, table, keys - 1)
    assert np.all(row_sum == 16336 * keys) and np.all(pg == (P - 1) * 16336 * keys % P)


def test_attention_refuses_bad_tables(isa: str) -> None:
    rng = np.random.default_rng(1)
    table, k, s, v, _ = cache(rng, 300, 1, 8)
    q, q_scale = int8s(rng, 4, 2, 8), np.ones((4, 2), np.float32)
    kernels.attention(q, q_scale, k, s, v, table, 296)
    for bad in (table[:1], np.array([0, k.shape[0]], np.int32), np.array([-1, 0], np.int32)):
        with pytest.raises(InternalError):
            kernels.attention(q, q_scale, k, s, v, bad, 296)
    for start in (-1, 131_072, 2**62):
        with pytest.raises(InternalError):
            kernels.attention(q, q_scale, k, s, v, table, start)


# --- words and switches -----------------------------------------------------------------------------------------------


def test_words() -> None:
    page = bytearray(64)
    kernels.store_release_u64(page, 8, 2**64 - 2)
    assert kernels.load_acquire_u64(page, 8) == 2**64 - 2
    assert bytes(page[8:16]) == b"\xfe" + b"\xff" * 7 and not any(page[16:])
    for offset in (-8, 4, 60, 64, 2**62):
        with pytest.raises(ValueError):
            kernels.load_acquire_u64(page, offset)
    with pytest.raises(ValueError):
        kernels.store_release_u64(bytes(64), 0, 1)


def test_switches() -> None:
    with pytest.raises(ConfigError):
        kernels.set_isa("mmx")
    with pytest.raises(ConfigError):
        kernels.set_threads(0)
    assert kernels.available_isas()[0] == "portable"
    assert kernels.active_isa() in kernels.available_isas()
