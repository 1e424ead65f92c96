"""The codec: what is encoded is decoded, and nothing else is accepted, within bounded work."""

from __future__ import annotations

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veriattn.errors import MalformedMessage, ProverFault
from veriattn.wire import messages as wm

LIMITS = wm.Limits(max_tokens_per_step=64, max_sequences=4, max_positions=1000, kv_tokens=4000, vocab_size=500)
U64 = st.integers(0, 2**64 - 1)
DIGEST = "ab" * 32


@st.composite
def steps(draw: st.DrawFn) -> wm.Step:
    seq_ids = draw(st.lists(U64, min_size=1, max_size=LIMITS.max_sequences, unique=True))
    entries = []
    for seq_id in seq_ids:
        num_tokens = draw(st.integers(1, LIMITS.max_tokens_per_step // LIMITS.max_sequences))
        start = draw(st.integers(0, LIMITS.max_positions - num_tokens))
        entries.append(wm.StepEntry(seq_id, start, num_tokens, draw(st.sampled_from(wm.LogitRows))))
    total = sum(e.num_tokens for e in entries)
    ids = draw(st.lists(st.integers(0, LIMITS.vocab_size - 1), min_size=total, max_size=total))
    mode, check = draw(st.sampled_from([wm.Mode.CLAIMS, wm.Mode.LOGITS])), draw(st.sampled_from(wm.AttentionCheck))
    return wm.Step(draw(U64), mode, check, tuple(entries), np.array(ids, np.int32))


def same(a: wm.Step, b: wm.Step) -> bool:
    fields = ("step", "mode", "attention_check", "entries")
    return all(getattr(a, f) == getattr(b, f) for f in fields) and np.array_equal(a.token_ids_i32, b.token_ids_i32)


def hello() -> wm.Hello:
    return wm.Hello(1, 0x0123456789ABCDEF, "/models/a b/ü", DIGEST, wm.Mode.CLAIMS, LIMITS)


def one_step() -> wm.Step:
    entries = (wm.StepEntry(7, 3, 2, wm.LogitRows.LAST), wm.StepEntry(9, 0, 1, wm.LogitRows.NONE))
    return wm.Step(5, wm.Mode.CLAIMS, wm.AttentionCheck.REPLAY, entries, np.array([1, 2, 499], np.int32))


@given(st.sampled_from(wm.Kind), U64, U64, U64)
def test_header_round_trip(kind: wm.Kind, session: int, seq: int, size: int) -> None:
    raw = wm.encode_header(kind, session, seq, size)
    assert len(raw) == 32
    assert wm.HEADER.unpack(raw) == (wm.MAGIC, kind, 0, session, seq, size)


def test_bytes_are_those_of_the_document() -> None:
    assert wm.encode_header(wm.Kind.CLAIM, 1, 2, 3) == b"VAT1" + bytes.fromhex("0201 0000") + struct.pack(
        "<QQQ", 1, 2, 3
    )
    raw = wm.encode_step(one_step())
    expected = struct.pack("<QIIII", 5, 0, 0, 2, 3) + struct.pack("<QIIII", 7, 3, 2, 1, 0)
    assert raw == expected + struct.pack("<QIIII", 9, 0, 1, 0, 0) + struct.pack("<iii", 1, 2, 499)
    ready = wm.encode_ready(wm.Ready(77, 1, 1, "cpu"))
    assert ready == struct.pack("<IIII", 77, 1, 1, 0) + b"cpu".ljust(48, b"\0")
    assert wm.encode_error(3, "no") == struct.pack("<I", 3) + b"no".ljust(252, b"\0")
    assert wm.encode_hello(hello()) == (
        b'{"limits":{"kv_tokens":4000,"max_positions":1000,"max_sequences":4,"max_tokens_per_step":64,"vocab_size":500},'
        b'"mode":"claims","model_digest":"' + DIGEST.encode() + b'","model_path":"/models/a b/\\u00fc","protocol":1,'
        b'"session":"0123456789abcdef","spec":1}'
    )


@given(steps())
def test_step_round_trip(step: wm.Step) -> None:
    assert same(wm.decode_step(wm.encode_step(step), LIMITS), step)


@given(st.lists(U64, min_size=1, max_size=LIMITS.max_sequences))
def test_free_round_trip(seq_ids: list[int]) -> None:
    assert wm.decode_free(wm.encode_free(seq_ids), LIMITS) == tuple(seq_ids)


def test_hello_round_trip() -> None:
    assert wm.decode_hello(wm.encode_hello(hello())) == hello()


@given(st.text(max_size=80), st.integers(0, 2**32 - 1))
def test_ready_round_trip(device: str, pid: int) -> None:
    raw = wm.encode_ready(wm.Ready(pid, wm.PROTOCOL_VERSION, 1, device))
    ready = wm.decode_ready(raw, spec=1)
    assert len(raw) == wm.READY_BYTES and ready.pid == pid
    assert len(ready.device) <= 48 and ready.device.isprintable()


@given(st.binary(min_size=256, max_size=256))
def test_error_text_is_fit_for_a_terminal(raw: bytes) -> None:
    _, text = wm.decode_error(raw)
    assert text.isprintable() and len(text) <= 252


def test_error_text_loses_escape_sequences() -> None:
    code, text = wm.decode_error(wm.encode_error(3, "bad\x1b[2J\r\n\u202ereversed"))
    assert (code, text) == (3, "bad [2J reversed")


@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol", 2), ("protocol", True), ("spec", 0), ("spec", "1"), ("session", "0123"), ("session", "G" * 16),
     ("model_digest", DIGEST.upper()), ("model_path", "a\0b"), ("model_path", "x" * 5000), ("mode", "all"),
     ("mode", ["claims"]), ("limits", {}), ("extra", 1)],
)  # fmt: skip
def test_hello_refuses(field: str, value: object) -> None:
    fields = json.loads(wm.encode_hello(hello()))
    assert wm.decode_hello(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()) == hello()
    fields[field] = value
    with pytest.raises(wm.BadRequest):
        wm.decode_hello(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, True, "5"])
def test_hello_refuses_limits(value: object) -> None:
    fields = json.loads(wm.encode_hello(hello()))
    fields["limits"]["kv_tokens"] = value
    with pytest.raises(wm.BadRequest):
        wm.decode_hello(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"[" * 60000, b"1" * 6000, b"\xff", b'{"protocol":1}', b" " * 70000])
def test_hello_refuses_other_documents(raw: bytes) -> None:
    with pytest.raises(wm.BadRequest):
        wm.decode_hello(raw)


def test_hello_has_one_encoding() -> None:
    raw = wm.encode_hello(hello())
    twins = [
        raw + b" ",
        raw.replace(b":1,", b": 1,", 1),
        b'{"spec":1,' + raw[1:],
        raw.replace(b'"spec":1', b'"spec":1.0'),
    ]
    for twin in twins:
        with pytest.raises(wm.BadRequest):
            wm.decode_hello(twin)


def patched(offset: int, fmt: str, value: int) -> bytes:
    raw = bytearray(wm.encode_step(one_step()))
    struct.pack_into(fmt, raw, offset, value)
    return bytes(raw)


@pytest.mark.parametrize(
    "raw",
    [
        patched(8, "<I", 2),  # mode
        patched(12, "<I", 2),  # attention check
        patched(16, "<I", 0),  # no entries
        patched(16, "<I", 1),  # length no longer fits
        patched(16, "<I", 2**32 - 1),
        patched(20, "<I", 2**32 - 1),
        patched(20, "<I", 4),
        patched(32, "<I", 999),  # start + num_tokens > max_positions
        patched(32, "<I", 2**32 - 1),
        patched(36, "<I", 0),  # empty entry
        patched(36, "<I", 3),  # sum differs
        patched(40, "<I", 3),  # logits
        patched(44, "<I", 5),  # a run on both sides of its limit
        patched(48, "<Q", 7),  # same sequence twice
        patched(72, "<i", -1),
        patched(72, "<i", 500),
        wm.encode_step(one_step())[:-1],
        wm.encode_step(one_step()) + b"\0",
        b"",
    ],
)
def test_step_refuses(raw: bytes) -> None:
    assert same(wm.decode_step(patched(8, "<I", 0), LIMITS), one_step())  # the untouched twin passes
    with pytest.raises(wm.BadRequest):
        wm.decode_step(raw, LIMITS)


def test_step_limits_are_tight() -> None:
    entry = wm.StepEntry(1, 0, 64, wm.LogitRows.ALL)
    ids = np.zeros(65, np.int32)
    full = wm.Step(0, wm.Mode.CLAIMS, wm.AttentionCheck.REPLAY, (entry,), ids[:64])
    assert same(wm.decode_step(wm.encode_step(full), LIMITS), full)
    over = wm.Step(0, full.mode, full.attention_check, (wm.StepEntry(1, 0, 65, wm.LogitRows.ALL),), ids)
    with pytest.raises(wm.BadRequest):
        wm.decode_step(wm.encode_step(over), LIMITS)
    assert len(wm.encode_step(full)) <= LIMITS.max_payload_bytes(wm.Kind.STEP)


@pytest.mark.parametrize("raw", [b"", bytes(7), bytes(9), bytes(40)])
def test_free_refuses(raw: bytes) -> None:
    with pytest.raises(wm.BadRequest):
        wm.decode_free(raw, LIMITS)


def test_ready_refuses() -> None:
    good = wm.encode_ready(wm.Ready(1, 1, 1, "cpu"))
    assert wm.decode_ready(good, spec=1).device == "cpu"
    for raw in (good[:-1], good + b"\0", good[:12] + b"\1" + good[13:]):
        with pytest.raises(MalformedMessage):
            wm.decode_ready(raw, spec=1)
    with pytest.raises(ProverFault) as caught:
        wm.decode_ready(good, spec=2)
    assert caught.value.code == "prover_fault"


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_fuzz_decoders_of_the_prover(raw: bytes) -> None:
    for decode in (wm.decode_hello, lambda r: wm.decode_step(r, LIMITS), lambda r: wm.decode_free(r, LIMITS)):
        try:
            decode(raw)
        except wm.BadRequest:
            continue


@given(steps(), st.data())
@settings(max_examples=200)
def test_fuzz_mutated_steps(step: wm.Step, data: st.DataObject) -> None:
    raw = bytearray(wm.encode_step(step))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = wm.decode_step(bytes(raw), LIMITS)
    except wm.BadRequest:
        return
    assert wm.encode_step(decoded) == bytes(raw)  # what is accepted has one encoding


@given(st.binary(max_size=300))
def test_fuzz_decoders_of_the_verifier(raw: bytes) -> None:
    for decode in (lambda r: wm.decode_ready(r, spec=1), wm.decode_error):
        try:
            decode(raw)
        except ProverFault:
            continue


def test_counts_in_a_message_do_not_decide_what_is_allocated() -> None:
    raw = struct.pack("<QIIII", 0, 0, 0, 4, 64)  # within limits, but nothing follows
    huge = struct.pack("<QIIII", 0, 0, 0, 2**32 - 1, 2**32 - 1)
    tracemalloc.start()
    try:
        for payload in (raw, huge):
            with pytest.raises(wm.BadRequest):
                wm.decode_step(payload, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
