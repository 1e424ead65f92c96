"""Issuing, keeping and handing out receipts; rotation of keys; the quote cache."""

from __future__ import annotations

import hashlib
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attest.conftest import ATTESTATION_NONCE, REQUEST, RESPONSE, event
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, SyntheticTdxProvider

from veriattn.attest import receipts
from veriattn.attest.canonical import canonical
from veriattn.attest.keys import TlsKey, report_data, signature_holds
from veriattn.attest.providers import QuoteCache, TestProvider, open_provider
from veriattn.attest.service import ReceiptService
from veriattn.attest.store import ReceiptStore
from veriattn.attest.tsm import TsmInterface
from veriattn.errors import (
    AttestationBusy,
    AttestationError,
    AttestationUnavailable,
    ConfigError,
    ReceiptNotFound,
    UsageError,
)


class Clock:
    def __init__(self, now: float = float(NOW)) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def service(**settings: Any) -> ReceiptService:
    return ReceiptService(settings.pop("provider", TestProvider()), **settings)


def issue(s: ReceiptService, owner: str = "key-1", chat: str = "chatcmpl-1", **options: Any) -> dict[str, Any]:
    return s.issue(REQUEST, RESPONSE, event(), owner, chat, **options)


def test_a_receipt_hashes_what_went_over_the_wire() -> None:
    r = issue(service())
    assert r["event_log"][0]["body_hash"] == "sha256:" + hashlib.sha256(REQUEST).hexdigest()
    assert r["event_log"][2]["body_hash"] == "sha256:" + hashlib.sha256(RESPONSE).hexdigest()


def test_a_stream_may_be_hashed_as_it_goes() -> None:
    s = service()
    chunks = [b'data: {"x":1}\n\n', b"data: [DONE]\n\n"]
    running = hashlib.sha256()
    for chunk in chunks:
        running.update(chunk)
    receipt_id = s.new_receipt_id()
    streamed = s.issue(REQUEST, None, event(), "k", "c", receipt_id=receipt_id, response_sha256=running.hexdigest())
    whole = s.issue(REQUEST, b"".join(chunks), event(), "k", "c2")
    assert streamed["receipt_id"] == receipt_id
    assert streamed["event_log"] == whole["event_log"]
    for both in ({}, {"response_bytes": b"x", "response_sha256": "00" * 32}):
        arguments = {"response_bytes": None, **both}
        with pytest.raises(UsageError):
            s.issue(REQUEST, event=event(), api_key_id="k", chat_id="c", **arguments)  # type: ignore[arg-type]


def test_an_event_with_fractions_is_refused() -> None:
    with pytest.raises(AttestationError, match="float"):
        service().issue(REQUEST, RESPONSE, event() | {"temperature": 0.5}, "k", "c")


def test_a_receipt_is_for_its_caller_only() -> None:
    s = service()
    r = issue(s)
    assert s.get(r["receipt_id"], "key-1") == r
    assert s.get("chatcmpl-1", "key-1") == r
    messages = set()
    for wanted, owner in ((r["receipt_id"], "key-2"), ("chatcmpl-1", "key-2"), ("nothing", "key-1"), ("", "")):
        with pytest.raises(ReceiptNotFound) as caught:
            s.get(wanted, owner)
        messages.add(caught.value.message)
    assert len(messages) == 1


def test_one_caller_cannot_take_anothers_chat_id() -> None:
    s = service()
    mine, theirs = issue(s, "key-1", "same"), issue(s, "key-2", "same")
    assert s.get("same", "key-1") == mine
    assert s.get("same", "key-2") == theirs


def test_retention() -> None:
    clock = Clock()
    s = service(store=ReceiptStore(retention_s=100, clock=clock), clock=clock)
    r = issue(s)
    clock.now += 99
    assert s.get(r["receipt_id"], "key-1") == r
    clock.now += 2
    with pytest.raises(ReceiptNotFound):
        s.get(r["receipt_id"], "key-1")
    assert len(s.store) == 0


def test_the_store_is_bounded() -> None:
    s = service(store=ReceiptStore(max_receipts=3))
    kept = [issue(s, chat=f"c{i}") for i in range(5)]
    assert len(s.store) == 3
    for i, r in enumerate(kept):
        if i < 2:
            with pytest.raises(ReceiptNotFound):
                s.get(f"c{i}", "key-1")
        else:
            assert s.get(f"c{i}", "key-1") == r


def test_what_is_on_disk_is_encrypted_and_private(tmp_path: Path) -> None:
    directory = tmp_path / "receipts"
    s = service(store=ReceiptStore(directory))
    r = issue(s)
    files = list(directory.iterdir())
    assert [f.name for f in files] == [r["receipt_id"] + ".receipt"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    raw = files[0].read_bytes()
    for secret in (b"key-1", b"chatcmpl-1", r["signature"].encode(), canonical(r)[:20]):
        assert secret not in raw
    assert s.get("chatcmpl-1", "key-1") == r


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_record_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("receipts")
    s = service(store=ReceiptStore(directory))
    r = issue(s)
    path = directory / (r["receipt_id"] + ".receipt")
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    with pytest.raises(AttestationError, match="deleted or altered"):
        s.get(r["receipt_id"], "key-1")


def test_swapped_deleted_and_empty_records_are_refused(tmp_path: Path) -> None:
    s = service(store=ReceiptStore(tmp_path))
    a, b = issue(s, "key-1", "a"), issue(s, "key-2", "b")
    path_a, path_b = (tmp_path / (r["receipt_id"] + ".receipt") for r in (a, b))
    raw_a, raw_b = path_a.read_bytes(), path_b.read_bytes()
    path_a.write_bytes(raw_b)
    path_b.write_bytes(b"")
    for chat, owner in (("a", "key-1"), ("b", "key-2")):
        with pytest.raises(AttestationError, match="deleted or altered"):
            s.get(chat, owner)
    path_a.unlink()
    with pytest.raises(AttestationError, match="deleted or altered"):
        s.get("a", "key-1")
    path_a.write_bytes(raw_a)
    assert s.get("a", "key-1") == a


def test_a_restart_with_the_key_reads_and_without_it_removes(tmp_path: Path) -> None:
    clock, key = Clock(), bytes(range(32))
    first = service(store=ReceiptStore(tmp_path, key=key, retention_s=100, clock=clock), clock=clock)
    r = issue(first)
    (tmp_path / "rcpt-junk.receipt").write_bytes(b"junk")
    again = ReceiptStore(tmp_path, key=key, retention_s=100, clock=clock)
    assert again.get("chatcmpl-1", "key-1") == r
    with pytest.raises(ReceiptNotFound):
        again.get(r["receipt_id"], "key-2")
    assert [p.name for p in tmp_path.iterdir()] == [r["receipt_id"] + ".receipt"]
    clock.now += 101
    expired = ReceiptStore(tmp_path, key=key, retention_s=100, clock=clock)
    assert len(expired) == 0
    assert list(tmp_path.iterdir()) == []
    issue(service(store=ReceiptStore(tmp_path)))
    assert len(ReceiptStore(tmp_path)) == 0


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError):
        ReceiptStore(retention_s=0)
    with pytest.raises(ConfigError):
        ReceiptStore(key=b"short")
    with pytest.raises(ConfigError):
        service(key_lifetime_s=10, rotate_before_s=10)
    with pytest.raises(ConfigError):
        QuoteCache(TestProvider(), burst=0)
    with pytest.raises(ConfigError, match="unknown attestation provider"):
        open_provider("none")


# --- attestation and rotation ---------------------------------------------------------------------------------------


def test_the_report_binds_key_set_and_nonce(platform: SyntheticTdx) -> None:
    s = service(provider=SyntheticTdxProvider(platform), tls_keys=[TlsKey("1" * 64, "example.com")])
    a = s.attestation(ATTESTATION_NONCE)
    assert a["workload_keyset_digest"] == s.keyset_digest()
    data = report_data(s.keyset_digest(), ATTESTATION_NONCE)
    assert a["attestation"]["report_data"] == data.hex()
    assert data.hex() in a["attestation"]["evidence"]["quote"]
    assert data[32:] == bytes(32)
    assert "warning" not in a
    assert s.attestation(None)["attestation"]["report_data"] == report_data(s.keyset_digest(), None).hex()


@pytest.mark.parametrize("nonce", ["", "0" * 63, "A" * 64, "x"])
def test_bad_nonces(nonce: str) -> None:
    with pytest.raises(UsageError):
        service().attestation(nonce)


def test_rotation_replaces_the_key_and_keeps_old_receipts_checkable() -> None:
    clock = Clock()
    s = service(store=ReceiptStore(retention_s=1000, clock=clock), clock=clock)
    old, before = s.keyset_digest(), issue(s, chat="before")
    clock.now += 10
    new = s.rotate([TlsKey("1" * 64, "example.com")])
    after = issue(s, chat="after")
    assert new == s.keyset_digest() != old
    assert (before["workload_keyset_digest"], after["workload_keyset_digest"]) == (old, new)
    assert before["key_id"] != after["key_id"]
    assert s.attestation(ATTESTATION_NONCE)["workload_keyset_digest"] == new
    past = s.attestation(ATTESTATION_NONCE, old)
    assert past["workload_keyset_digest"] == old
    key = past["attestation"]["workload_keyset"]["receipt_signing_keys"][0]
    assert key["key_id"] == before["key_id"]
    assert signature_holds(key["public_key"], receipts.signing_input(before), before["signature"])
    with pytest.raises(UsageError, match="no key set of that digest"):
        s.attestation(ATTESTATION_NONCE, "sha256:" + "0" * 64)


def test_keys_are_replaced_before_they_expire_and_forgotten_after_their_receipts() -> None:
    clock = Clock()
    store = ReceiptStore(retention_s=50, clock=clock)
    s = service(store=store, key_lifetime_s=1000, rotate_before_s=100, clock=clock)
    first = s.keyset()
    assert (first.not_before, first.not_after) == (NOW, NOW + 1000)
    clock.now += 899
    assert s.keyset_digest() == first.digest
    clock.now += 1
    r = issue(s)
    assert r["workload_keyset_digest"] != first.digest
    assert s.keyset().not_before <= r["served_at"] <= s.keyset().not_after
    assert s.attestation(ATTESTATION_NONCE, first.digest)["workload_keyset_digest"] == first.digest
    clock.now += 151
    s.rotate()
    with pytest.raises(UsageError):
        s.attestation(ATTESTATION_NONCE, first.digest)


def test_the_short_signature() -> None:
    s = service()
    r = issue(s)
    short = s.signature("chatcmpl-1", "key-1")
    assert short["text"] == f"{hashlib.sha256(REQUEST).hexdigest()}:{hashlib.sha256(RESPONSE).hexdigest()}"
    assert signature_holds(short["signing_address"], short["text"].encode(), short["signature"])
    with pytest.raises(UsageError, match="ecdsa"):
        s.signature("chatcmpl-1", "key-1", "ecdsa")
    with pytest.raises(ReceiptNotFound):
        s.signature("chatcmpl-1", "key-2")
    s.rotate()
    with pytest.raises(ReceiptNotFound, match="replaced"):
        s.signature("chatcmpl-1", "key-1")
    assert s.get("chatcmpl-1", "key-1") == r


def test_many_threads() -> None:
    s = service(store=ReceiptStore(max_receipts=1000))
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(20):
                r = issue(s, f"key-{n}", f"chat-{n}-{i}")
                if i % 5 == 0:
                    s.rotate()
                if s.get(f"chat-{n}-{i}", f"key-{n}") != r:
                    raise AssertionError("another receipt")
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
    assert len(s.store) == 160


# --- the quote cache ------------------------------------------------------------------------------------------------


def test_one_quote_per_key_set_and_nonce(platform: SyntheticTdx) -> None:
    provider = SyntheticTdxProvider(platform)
    s = service(provider=provider)
    for _ in range(3):
        s.attestation("1" * 64)
    s.attestation("2" * 64)
    assert provider.asked == 2
    s.rotate()
    s.attestation("1" * 64)
    assert provider.asked == 3
    issue(s)
    assert provider.asked == 3


def test_the_rate_of_quotes_is_limited() -> None:
    clock = Clock(0.0)
    cache = QuoteCache(TestProvider(), per_minute=6, burst=2, clock=clock)
    for i in (0, 1, 0, 1):
        cache.evidence(bytes([i]) * 64)
    with pytest.raises(AttestationBusy) as caught:
        cache.evidence(bytes([2]) * 64)
    assert (caught.value.code, caught.value.retry_after_s) == ("attestation_rate_limited", 11)
    assert cache.evidence(bytes(64))
    clock.now += 10
    cache.evidence(bytes([2]) * 64)
    with pytest.raises(AttestationBusy):
        cache.evidence(bytes([3]) * 64)


def test_the_cache_is_bounded_and_holds_no_failures() -> None:
    asked = []

    class Sometimes:
        name = "tdx"

        def evidence(self, data: bytes) -> dict[str, str]:
            asked.append(data[0])
            if len(asked) == 1:
                raise AttestationUnavailable("busy")
            return {"quote": data.hex()}

    cache = QuoteCache(Sometimes(), max_entries=2, burst=100)
    with pytest.raises(AttestationUnavailable):
        cache.evidence(bytes([0]))
    for n in (0, 1, 0, 2, 0, 1):
        assert cache.evidence(bytes([n])) == {"quote": bytes([n]).hex()}
    assert asked == [0, 0, 1, 2, 1]


def test_what_the_cache_gives_out_cannot_be_changed_from_outside() -> None:
    cache = QuoteCache(TestProvider())
    cache.evidence(bytes(64))["warning"] = "all is well"
    assert "proves nothing" in cache.evidence(bytes(64))["warning"]


def test_auto_is_test_where_there_is_no_tee(tmp_path: Path) -> None:
    assert open_provider("auto", TsmInterface(tmp_path / "none")).name == "test"
    with pytest.raises(AttestationUnavailable):
        open_provider("tdx", TsmInterface(tmp_path / "none")).evidence(bytes(64))
