"""Canonical JSON, digests, keys, and the published values of the aci/1 specification."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from veriattn.attest import receipts
from veriattn.attest.canonical import MAX_INTEGER, canonical, decimal_text, parse_object, plain, sha256_text
from veriattn.attest.keys import KeySet, SigningKey, TlsKey, check_nonce, report_data, signature_holds
from veriattn.errors import AttestationError, UsageError
from veriattn.spec.sampler import SamplingParams

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_canonical_json_reads_back_and_is_stable(value: Any) -> None:
    raw = canonical({"v": value})
    assert parse_object(raw, "x") == {"v": value}
    assert canonical(parse_object(raw, "x")) == raw


@given(st.dictionaries(st.text("abcXYZ09_", min_size=1), st.integers(0, 99), min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_members(value: dict[str, int]) -> None:
    assert canonical(dict(reversed(list(value.items())))) == canonical(value)
    assert canonical(value) == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "value", [1.5, 1.0, float("nan"), 2**53, -(2**53), b"x", {1: 2}, "\ud800", {"\udfff": 1}, object(), {1, 2}]
)
def test_what_canonical_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(AttestationError):
        canonical({"v": value})


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a":2}', b'{"a":1.0}', b'{"a":1e3}', b'{"a":NaN}', b'{"a":Infinity}', b"[]", b"1", b"", b"{",
        b'{"a":9007199254740992}', b"\xff", b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}", b'{"x":{"a":1,"a":1}}',
    ],
)  # fmt: skip
def test_json_that_is_ambiguous_or_not_exact_is_refused(raw: bytes) -> None:
    with pytest.raises(AttestationError, match=r"^thing: "):
        parse_object(raw, "thing")


def test_json_is_bounded() -> None:
    with pytest.raises(AttestationError, match="larger than 4 bytes"):
        parse_object(b'{"a": 1}', "thing", limit=4)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_fractions_are_text_that_reads_back_exactly(x: float) -> None:
    assert float(decimal_text(x)) == x
    assert plain({"x": x}) == {"x": decimal_text(x)}


def test_plain() -> None:
    assert plain({"a": (1, 2.5), "b": 2**64, "c": None, "d": True}) == {
        "a": [1, "2.5"], "b": str(2**64), "c": None, "d": True,
    }  # fmt: skip


# The values below are those of the aci/1 specification's test vectors (Dstack-TEE, spec/test-vectors.md, Apache-2.0),
# which were computed by an implementation that has nothing to do with this one.

ACI_KEYSET = {
    "subject": "dstack-app://example-app",
    "not_after": 1800000000,
    "receipt_signing_keys": [
        {
            "key_id": "receipt-1",
            "algo": "ed25519",
            "public_key": "8139770ea87d175f56a35466c34c7ecccb8d8a91b4ee37a25df60f5b8fc9b394",
        }
    ],
    "e2ee_public_keys": [
        {
            "key_id": "e2ee-1",
            "algo": "x25519-aes-256-gcm-hkdf-sha256",
            "public_key": "5dfedd3b6bd47f6fa28ee15d969d5bb0ea53774d488bdaf9df1c6e0124b3ef22",
        }
    ],
    "tls_public_keys": [{"spki_sha256": "c0" * 32, "domain": "api.example.com"}],
}
ACI_KEYSET_DIGEST = "sha256:53a5cd44b30dcc51999754c719f2628a041f174ecbf9662a6f8e898a10cd9371"


def test_the_key_set_digest_of_the_specification() -> None:
    assert sha256_text(canonical(ACI_KEYSET)) == ACI_KEYSET_DIGEST


def test_the_report_data_of_the_specification() -> None:
    nonce = bytes(range(32)).hex()
    assert report_data(ACI_KEYSET_DIGEST, nonce).hex() == (
        "df2174d28130852b413646a3786927b93e94c11d770268b65def8bdba45cb49e" + "00" * 32
    )
    assert report_data(ACI_KEYSET_DIGEST, None).hex() == (
        "0633919ca3f00e97bafaa3304278eb22420cc3ff0d19f87dfca2d3f7508150bc" + "00" * 32
    )


def test_the_signature_of_the_specification() -> None:
    request_hash = sha256_text(b'{"messages":[{"content":"hi","role":"user"}],"model":"demo-model"}')
    response_hash = sha256_text(b'{"choices":[],"id":"chatcmpl-123"}')
    document = {
        "api_version": "aci/1",
        "receipt_id": "rcpt-0001",
        "chat_id": "chatcmpl-123",
        "model": "demo-model",
        "workload_keyset_digest": ACI_KEYSET_DIGEST,
        "endpoint": "/v1/chat/completions",
        "method": "POST",
        "served_at": 1750000000,
        "event_log": [
            {"type": "request.received", "body_hash": request_hash},
            {"type": "request.forwarded", "body_hash": request_hash},
            {
                "type": "upstream.verified",
                "result": "verified",
                "required": True,
                "model_id": "demo-model",
                "session_id": "95ad1cb4dd25445808c2e9d116caf420b05703730b506395e8fc1ca6faeae28f",
            },
            {"type": "response.returned", "body_hash": response_hash},
        ],
        "key_id": "receipt-1",
        "signature": "d5b005e093bde3b577faf270b7184b09e169cacb0ecb206b103bd2581f997db0"
        "3da616175454b063323a23ac1dc68f1ce506c2a6eba8aa0561d5e724f0b80c03",
    }
    signed = receipts.signing_input(document)
    assert hashlib.sha256(signed).hexdigest() == "1bd328e6880a5a12b3915af95ea32111310e04ab9e21ac3d71ce268e33b965c9"
    public = ACI_KEYSET["receipt_signing_keys"][0]["public_key"]  # type: ignore[index]
    assert signature_holds(public, signed, str(document["signature"]))
    assert not signature_holds(public, signed + b" ", str(document["signature"]))
    with pytest.raises(AttestationError, match="its events are"):
        receipts.parse(document)


# --- digests, nonces, keys ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), max_size=8), st.lists(st.integers(0, 2**32 - 1), max_size=8))
def test_digests_of_token_ids_are_of_the_ids(a: list[int], b: list[int]) -> None:
    assert (receipts.ids_digest(a) == receipts.ids_digest(b)) == (a == b)


def test_the_layout_of_the_token_digest() -> None:
    raw = b"veriattn/token-ids/1" + struct.pack("<Q", 2) + struct.pack("<II", 7, 2**32 - 1)
    assert receipts.ids_digest([7, 2**32 - 1]) == sha256_text(raw)


@pytest.mark.parametrize("nonce", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, " " * 64, None, 5, "0" * 64 + "\n"])
def test_nonces_are_64_lowercase_hexadecimal_digits(nonce: Any) -> None:
    assert check_nonce("0123456789abcdef" * 4) == "0123456789abcdef" * 4
    with pytest.raises(UsageError, match="64 lowercase"):
        check_nonce(nonce)


def test_sampling_is_exact() -> None:
    params = SamplingParams(temperature=0.1, top_p=1 / 3, logit_bias=((5, -2.5),), seed=-1)
    data = receipts.sampling_json(params, 7)
    assert (data["temperature"], data["seed"], data["logit_bias"]) == ("0.1", str(2**64 - 1), [[5, "-2.5"]])
    assert float(data["top_p"]) == 1 / 3
    assert set(data) == {*SamplingParams.__dataclass_fields__, "max_tokens", "ignore_eos"}


def test_keys_differ_and_do_not_show_their_private_half() -> None:
    a, b = SigningKey(), SigningKey()
    assert a.public_hex != b.public_hex
    private = a._key.private_bytes_raw().hex()
    assert private not in repr(a) + str(vars(a))
    assert a.sign(b"x") == Ed25519PrivateKey.from_private_bytes(bytes.fromhex(private)).sign(b"x").hex()


@given(st.binary(max_size=64), st.integers(0, 511))
def test_a_signature_with_any_bit_changed_does_not_hold(message: bytes, bit: int) -> None:
    key = SigningKey()
    signature = bytearray.fromhex(key.sign(message))
    assert signature_holds(key.public_hex, message, signature.hex())
    signature[bit // 8] ^= 1 << bit % 8
    assert not signature_holds(key.public_hex, message, signature.hex())


@pytest.mark.parametrize("bad", ["", "00", "zz" * 64, "00" * 65, "AB" * 64])
def test_malformed_signatures_and_keys_do_not_hold(bad: str) -> None:
    key = SigningKey()
    assert not signature_holds(key.public_hex, b"x", bad)
    assert not signature_holds(bad, b"x", key.sign(b"x"))


def test_a_key_set_reads_back() -> None:
    keyset = KeySet("me", 1, 2, (("k", "ab" * 32),), (TlsKey("cd" * 32, "example.com"),))
    assert KeySet.from_json(json.loads(canonical(keyset.to_json()))) == keyset
    assert keyset.public_key("k") == "ab" * 32
    assert keyset.public_key("other") is None


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"not_after": "2"}, "not_after"),
        ({"not_before": True}, "not_before"),
        ({"extra": 1}, "unknown"),
        ({"receipt_signing_keys": []}, "receipt_signing_keys"),
        ({"receipt_signing_keys": [{"key_id": "k", "algo": "none", "public_key": "ab" * 32}]}, "algorithm"),
        ({"receipt_signing_keys": [{"key_id": "k", "algo": "ed25519", "public_key": "ab"}]}, "32 bytes"),
        ({"receipt_signing_keys": 2 * [{"key_id": "k", "algo": "ed25519", "public_key": "ab" * 32}]}, "twice"),
        ({"receipt_signing_keys": [5]}, "receipt_signing_keys"),
        ({"tls_public_keys": {}}, "tls_public_keys"),
        ({"subject": 1}, "subject"),
    ],
)
def test_malformed_key_sets(change: dict[str, Any], fragment: str) -> None:
    good = KeySet("me", 1, 2, (("k", "ab" * 32),)).to_json()
    with pytest.raises(AttestationError, match=fragment):
        KeySet.from_json(good | change)
