"""Single operations on the wire: whatever is encoded decodes to the same; nothing outside of the limits is accepted."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veriattn.spec.model import ModelConfig
from veriattn.wire.messages import BadRequest, Buffer, Limits, byte_view
from veriattn.wire.operations import (
    AttendRequest,
    LinearRequest,
    Reply,
    Run,
    WeightsRequest,
    decode_attend,
    decode_linear,
    decode_weights,
    encode_attend,
    encode_linear,
    encode_weights,
    max_request_bytes,
    row_tiles,
)

CONFIG = ModelConfig(16, 2, 6, 3, 4, 24, 100, 512, 4, 1e-5)
LIMITS = Limits(max_tokens_per_step=20, max_sequences=4, max_positions=64, kv_tokens=256, vocab_size=100)


def joined(pieces: list[Buffer]) -> bytes:
    return b"".join(bytes(byte_view(p)) for p in pieces)


def ints(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.random.default_rng(seed).integers(-127, 128, shape, dtype=np.int8)


def floats(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def linear(seed: int = 0, index: int = 3, rows: int = 5) -> bytes:
    width = list(CONFIG.linear_shapes().values())[index][1]
    return joined(encode_linear(LinearRequest(index, ints(seed, rows, width))))


def attend_request(runs: tuple[Run, ...], first: int = 0, count: int = 3, seed: int = 0, **more: Any) -> AttendRequest:
    t, heads, d = sum(r.num_tokens for r in runs), 2 * count, CONFIG.head_dim
    fields: dict[str, Any] = {"layer": 1, "reply": Reply.OUTPUTS, "row_tile": 2} | more
    return AttendRequest(
        first_kv_head=first, num_kv_heads=count, runs=runs, q_i8=ints(seed, t, heads, d), q_scale=floats(seed, t, heads),
        k_i8=ints(seed + 1, t, count, d), k_scale=floats(seed + 1, t, count), v_i8=ints(seed + 2, t, count, d), **fields,
    )  # fmt: skip


@given(st.integers(0, 8), st.integers(1, 20), st.integers(0, 99))
def test_linear_round_trip(index: int, rows: int, seed: int) -> None:
    raw = linear(seed, index, rows)
    got = decode_linear(raw, CONFIG, LIMITS)
    assert got.index == index and np.array_equal(got.a_i8, ints(seed, rows, got.a_i8.shape[1]))
    assert joined(encode_linear(got)) == raw
    assert len(raw) <= max_request_bytes(CONFIG, LIMITS)


@st.composite
def attend_requests(draw: st.DrawFn) -> AttendRequest:
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ids = draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(counts), max_size=len(counts), unique=True))
    starts = draw(st.lists(st.integers(0, 59), min_size=len(counts), max_size=len(counts)))
    first = draw(st.integers(0, 2))
    return attend_request(
        tuple(Run(i, s, n) for i, s, n in zip(ids, starts, counts, strict=True)),
        first, draw(st.integers(1, 3 - first)), draw(st.integers(0, 99)), layer=draw(st.integers(0, 1)),
        reply=draw(st.sampled_from(Reply)), row_tile=draw(st.integers(1, 20)),
    )  # fmt: skip


@given(attend_requests())
def test_attend_round_trip(request: AttendRequest) -> None:
    raw = joined(encode_attend(request))
    got = decode_attend(raw, CONFIG, LIMITS)
    for name in AttendRequest.__slots__:
        assert np.array_equal(getattr(got, name), getattr(request, name))
    assert joined(encode_attend(got)) == raw
    assert len(raw) <= max_request_bytes(CONFIG, LIMITS)


@given(st.integers(0, 1), st.integers(1, 20), st.integers(0, 44), st.integers(0, 2**64 - 1))
def test_weights_round_trip(layer: int, rows: int, before: int, seq_id: int) -> None:
    p = np.random.default_rng(before).integers(0, 16385, (6, rows, rows + before)).astype(np.uint16)
    raw = joined(encode_weights(WeightsRequest(layer, seq_id, p)))
    got = decode_weights(raw, CONFIG, LIMITS)
    assert (got.layer, got.seq_id) == (layer, seq_id) and np.array_equal(got.p_u16, p)
    assert joined(encode_weights(got)) == raw
    assert len(raw) <= max_request_bytes(CONFIG, LIMITS)


def patched(raw: bytes, at: int, value: int, size: int = 4) -> bytes:
    return raw[:at] + value.to_bytes(size, "little") + raw[at + size :]


RUNS = (Run(1, 0, 3), Run(2, 60, 4))
ATTEND = joined(encode_attend(attend_request(RUNS)))
WEIGHTS = joined(encode_weights(WeightsRequest(0, 1, np.zeros((6, 2, 5), np.uint16))))


@pytest.mark.parametrize(
    "raw",
    {
        "short": linear()[:15], "index": patched(linear(), 0, 9), "no rows": patched(linear(), 4, 0)[:16],
        "many rows": patched(linear(), 4, 21) + bytes(16 * 24), "padding": patched(linear(), 8, 1),
        "longer": linear() + b"\0", "shorter": linear()[:-1], "other rows": patched(linear(), 4, 4),
    }.values(),
)  # fmt: skip
def test_bad_linear(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_linear(raw, CONFIG, LIMITS)


#: Fields of ATTEND: layer 0, first_kv_head 4, num_kv_heads 8, reply 12, row_tile 16, entries 20, total 24, padding 28;
#: entries at 32: seq_id, start, num_tokens.
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 2), (4, 1), (4, 3), (4, 2**32 - 1), (8, 0), (8, 4), (8, 2**32 - 1), (12, 3), (16, 0), (16, 21), (20, 0), (20, 5),
        (20, 1), (24, 0), (24, 21), (24, 6), (28, 1), (32, 2), (44, 0), (44, 4), (56, 61), (56, 2**32 - 1), (60, 5),
    ],
)  # fmt: skip
def test_bad_attend(at: int, value: int) -> None:
    decode_attend(ATTEND, CONFIG, LIMITS)
    with pytest.raises(BadRequest):
        decode_attend(patched(ATTEND, at, value), CONFIG, LIMITS)


@pytest.mark.parametrize("raw", [b"", ATTEND[:31], ATTEND[:-1], ATTEND + b"\0", ATTEND[:40]])
def test_attend_of_another_length(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_attend(raw, CONFIG, LIMITS)


#: Fields of WEIGHTS: seq_id 0, layer 8, rows 12, keys 16, padding 20.
@pytest.mark.parametrize(("at", "value"), [(8, 2), (12, 0), (12, 3), (12, 21), (16, 1), (16, 65), (16, 6), (20, 1)])
def test_bad_weights(at: int, value: int) -> None:
    decode_weights(WEIGHTS, CONFIG, LIMITS)
    with pytest.raises(BadRequest):
        decode_weights(patched(WEIGHTS, at, value), CONFIG, LIMITS)
    with pytest.raises(BadRequest):
        decode_weights(WEIGHTS[:at], CONFIG, LIMITS)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([linear(), ATTEND, WEIGHTS]), st.integers(0, 80))
def test_any_bytes_are_refused_or_canonical(noise: bytes, valid: bytes, at: int) -> None:
    raw = valid[:at] + noise + valid[at + len(noise) :]
    for decode, encode in (
        (decode_linear, encode_linear),
        (decode_attend, encode_attend),
        (decode_weights, encode_weights),
    ):
        try:
            message = decode(raw, CONFIG, LIMITS)  # type: ignore[operator]
        except BadRequest:
            continue
        assert joined(encode(message)) == raw  # type: ignore[operator]


def test_sizes_do_not_overflow() -> None:
    """Counts that multiply to more than 64 bits are refused by their limits, before anything is allocated."""
    huge = struct.pack("<IIIIIIII", 1, 0, 3, 0, 1, 2**32 - 1, 2**32 - 1, 0)
    with pytest.raises(BadRequest):
        decode_attend(huge, CONFIG, LIMITS)
    with pytest.raises(BadRequest):
        decode_weights(struct.pack("<QIIII", 1, 0, 2**32 - 1, 2**32 - 1, 0), CONFIG, LIMITS)


@given(st.integers(1, 300), st.integers(1, 300))
def test_row_tiles_cover_everything_once(rows: int, tile: int) -> None:
    tiles = row_tiles(rows, tile)
    assert [i for t in tiles for i in range(t.start, t.stop)] == list(range(rows))
    assert all(0 < t.stop - t.start <= tile for t in tiles)
