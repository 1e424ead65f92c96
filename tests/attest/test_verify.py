"""Every way in which a receipt or its attestation can be wrong is refused by the step that is there for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.attest.conftest import (
    ATTESTATION_NONCE,
    CLIENT_NONCE,
    MODEL_DIGEST,
    REQUEST,
    RESPONSE,
    Case,
    event,
)
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, SyntheticTdxProvider, synthetic_image

from veriattn.attest import receipts
from veriattn.attest.canonical import digest_of
from veriattn.attest.keys import SigningKey, TlsKey
from veriattn.attest.policy import Policy, TdxPolicy
from veriattn.attest.providers import TestProvider
from veriattn.attest.quotes import TdxVerifier, production_verifiers
from veriattn.attest.service import ReceiptService
from veriattn.attest.verify import ReceiptVerifier, Step, Verification
from veriattn.errors import AttestationError

STEPS = [
    "receipt.format", "attestation.format", "attestation.keyset", "attestation.nonce", "quote.signature",
    "quote.report_data", "quote.measurements", "receipt.keyset", "receipt.key_window", "receipt.signature",
    "receipt.nonce", "receipt.request", "receipt.response", "receipt.model", "receipt.event",
]  # fmt: skip


def status(v: Verification, name: str) -> str:
    return next(s.status for s in v.steps if s.name == name)


def reason(v: Verification, name: str) -> str:
    return next(s.reason for s in v.steps if s.name == name)


def test_the_honest_receipt_is_verified_with_every_step_passed(case: Case) -> None:
    v = case.check()
    assert [s.name for s in v.steps] == STEPS
    assert {s.status for s in v.steps} == {"PASS"}
    assert v.verdict == "VERIFIED"
    assert v.image == "image"
    v.require()


# --- every field of the receipt -------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values that are neither an object nor a list, and of empty ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path
    for key, item in list(items):
        yield from leaves(item, (*path, key))


def flipped(value: Any) -> Any:
    """Another value of the same type, by one bit where it can be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ 1
    if isinstance(value, str):
        if not value:
            return "0"
        last = value[-1]
        return value[:-1] + (chr(ord(last) ^ 1))
    return [1] if isinstance(value, list) else {"x": 1}


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


TEMPLATE = ReceiptService(TestProvider()).issue(REQUEST, RESPONSE, event(), "key-1", "chatcmpl-1")
PATHS = list(leaves(TEMPLATE))


def test_the_fields_are_all_there() -> None:
    assert len(PATHS) > 50
    assert {p[0] for p in PATHS} == set(TEMPLATE)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: ".".join(map(str, p)))
def test_any_field_flipped_is_refused(case: Case, path: tuple[Any, ...]) -> None:
    at(case.receipt, path[:-1])[path[-1]] = flipped(at(case.receipt, path))
    v = case.check()
    assert v.verdict == "REFUSED"
    assert status(v, "receipt.signature") != "PASS"
    assert {"receipt.format", "receipt.signature"} & set(v.failed())
    with pytest.raises(AttestationError) as caught:
        v.require()
    assert caught.value.code == "attestation"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", sorted(TEMPLATE))
def test_a_missing_or_added_field_is_refused(case: Case, name: str) -> None:
    value = case.receipt.pop(name)
    assert case.check().failed()[0] == "receipt.format"
    case.receipt[name] = value
    assert case.check().verdict == "VERIFIED"
    case.receipt[name + "2"] = value
    assert "receipt.format" in case.check().failed()


@pytest.mark.parametrize("junk", [None, [], "x", 1, {}, {"receipt_id": 1}, {"event_log": [[]]}])
def test_nothing_that_a_server_sends_raises(case: Case, junk: Any) -> None:
    for name in case.receipt:
        broken = {**case.receipt, name: junk}
        assert case.verifier.verify(broken, case.attestation, case.expect).verdict == "REFUSED"
    for name in case.attestation["attestation"]:
        inner = {**case.attestation["attestation"], name: junk}
        report = {**case.attestation, "attestation": inner}
        assert case.verifier.verify(case.receipt, report, case.expect).verdict == "REFUSED"
    for name in case.attestation:
        report = {**case.attestation, name: junk}
        assert case.verifier.verify(case.receipt, report, case.expect).verdict == "REFUSED"


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values but the document itself."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(item, (*path, key))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_in_the_place_of_any_value_is_refused_and_never_raises(data: st.DataObject, case: Case) -> None:
    documents = {"receipt": copy.deepcopy(case.receipt), "attestation": copy.deepcopy(case.attestation)}
    which = data.draw(st.sampled_from(sorted(documents)))
    path = data.draw(st.sampled_from(list(nodes(documents[which]))))
    before, after = at(documents[which], path), data.draw(any_json)
    at(documents[which], path[:-1])[path[-1]] = after
    v = case.verifier.verify(documents["receipt"], documents["attestation"], case.expect)
    if type(before) is type(after) and before == after:
        assert v.verdict == "VERIFIED"
    else:
        assert v.verdict != "VERIFIED"
    json.dumps(v.to_json(), default=str)


# --- the same content, validly signed, but wrong --------------------------------------------------------------------


def resigned(case: Case, key: SigningKey, **changes: Any) -> dict[str, Any]:
    document = {k: v for k, v in case.receipt.items() if k != "signature"} | {"key_id": key.key_id} | changes
    return {**document, "signature": key.sign(receipts.signing_input(document))}


def test_another_key_is_refused(case: Case) -> None:
    key = SigningKey()
    case.receipt = resigned(case, key)
    v = case.check()
    assert v.failed() == ["receipt.signature"]
    assert reason(v, "receipt.signature") == "the receipt's key is not in the key set"
    case.receipt["key_id"] = case.attestation["attestation"]["workload_keyset"]["receipt_signing_keys"][0]["key_id"]
    v = case.check()
    assert v.failed() == ["receipt.signature"]
    assert reason(v, "receipt.signature").startswith("the signature does not hold")


def test_a_key_put_into_the_key_set_is_refused(case: Case) -> None:
    """The attacker signs with an own key and lists it: the digest, or the quote, gives it away."""
    key = SigningKey()
    keyset = case.attestation["attestation"]["workload_keyset"]
    keyset["receipt_signing_keys"].append(key.to_json())
    case.receipt = resigned(case, key)
    v = case.check()
    assert set(v.failed()) == {"attestation.keyset", "quote.report_data", "receipt.keyset"}
    digest = digest_of(keyset)
    case.attestation["workload_keyset_digest"] = digest
    case.receipt = resigned(case, key, workload_keyset_digest=digest)
    v = case.check()
    assert v.failed() == ["quote.report_data"]
    assert reason(v, "quote.report_data") == "the quote is not over this key set and nonce"


def test_a_replayed_receipt_is_refused(case: Case) -> None:
    """An old receipt for the same request, whose client drew another nonce."""
    v = case.check(client_nonce="d" * 64)
    assert v.failed() == ["receipt.nonce"]
    assert "replayed" in reason(v, "receipt.nonce")


def test_the_receipt_of_another_request_is_refused(case: Case) -> None:
    assert case.check(request=REQUEST + b" ").failed() == ["receipt.request"]
    assert case.check(response=RESPONSE + b" ").failed() == ["receipt.response"]
    other = case.service.issue(b"other", b"answer", event(client_nonce="e" * 64), "key-1", "chatcmpl-2")
    v = case.verifier.verify(other, case.attestation, case.expect)
    assert v.failed() == ["receipt.nonce", "receipt.request", "receipt.response"]


def test_a_stale_attestation_is_refused(case: Case) -> None:
    v = case.check(attestation_nonce="b" * 64)
    assert v.failed() == ["attestation.nonce", "quote.report_data"]
    case.attestation["nonce"] = "b" * 64
    assert case.check(attestation_nonce="b" * 64).failed() == ["quote.report_data"]


def test_the_attestation_of_another_server_is_refused(case: Case, platform: SyntheticTdx) -> None:
    other = ReceiptService(SyntheticTdxProvider(platform), clock=lambda: float(NOW))
    v = case.verifier.verify(case.receipt, other.attestation(ATTESTATION_NONCE), case.expect)
    assert v.failed()[0] == "receipt.keyset"
    assert status(v, "quote.report_data") == "PASS"


def test_another_model_is_refused(case: Case) -> None:
    v = case.check(model_digests=("6" * 64,))
    assert v.failed() == ["receipt.model"]
    assert MODEL_DIGEST in reason(v, "receipt.model")


def test_report_data_must_be_the_quotes_own(case: Case) -> None:
    case.attestation["attestation"]["report_data"] = "00" * 64
    assert case.check().failed() == ["quote.report_data"]


def test_validity_of_keys(make_case: Callable[..., Case]) -> None:
    case = make_case()
    keyset = case.service.keyset()
    late = resigned(case, case.service._key, served_at=keyset.not_after + 1)
    assert case.verifier.verify(late, case.attestation, case.expect).failed() == ["receipt.key_window"]
    early = resigned(case, case.service._key, served_at=keyset.not_before - 1)
    assert case.verifier.verify(early, case.attestation, case.expect).failed() == ["receipt.key_window"]
    future = resigned(case, case.service._key, served_at=NOW + 1000)
    v = case.verifier.verify(future, case.attestation, case.expect)
    assert (v.failed(), reason(v, "receipt.key_window")) == (["receipt.key_window"], "the receipt is from the future")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"result": "unverified"}, "was not verified"),
        ({"guarantee": "none"}, "was not verified"),
        ({"guarantee": "tolerance", "result": "tolerance"}, "was not verified"),
        ({"failures": 1}, "1 failures"),
        ({"soundness_bits": 97}, "97 soundness bits"),
        ({"protocol": "veriattn/0"}, "veriattn/0"),
        ({"spec_version": 2}, "spec version 2"),
        ({"checks": {}}, "counts no checks"),
        ({"checks": {"linear_rows": 0}}, "counts no checks"),
        ({"strategy": "run-ahead", "guarantee": "trusted-compute", "result": "trusted-compute"}, "was not verified"),
    ],
)
def test_events_that_do_not_say_verified(
    make_case: Callable[..., Case], changes: dict[str, Any], fragment: str
) -> None:
    case = make_case()
    log = copy.deepcopy(case.receipt["event_log"])
    log[1].update(changes)
    case.receipt = resigned(case, case.service._key, event_log=log)
    v = case.check()
    assert v.failed() == ["receipt.event"]
    assert fragment in reason(v, "receipt.event")


def test_full_tee_needs_no_soundness(make_case: Callable[..., Case]) -> None:
    case = make_case(strategy="full-tee", guarantee="trusted-compute", soundness_bits=None)
    assert case.check().verdict == "VERIFIED"


def test_tls_key(make_case: Callable[..., Case], platform: SyntheticTdx) -> None:
    case = make_case()
    assert case.check(tls_spki_sha256="1" * 64).failed() == ["tls.key"]
    key = TlsKey("1" * 64, "example.com")
    service = ReceiptService(SyntheticTdxProvider(platform), tls_keys=[key], clock=lambda: float(NOW))
    case.receipt = service.issue(REQUEST, RESPONSE, event(), "key-1", "chatcmpl-1")
    case.attestation = service.attestation(ATTESTATION_NONCE)
    assert case.check(tls_spki_sha256="1" * 64).verdict == "VERIFIED"
    assert case.check(tls_spki_sha256="2" * 64).failed() == ["tls.key"]


# --- skips never pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "step"),
    [
        ({"client_nonce": None}, "receipt.nonce"),
        ({"attestation_nonce": None}, "attestation.nonce"),
        ({"request": None}, "receipt.request"),
        ({"response": None}, "receipt.response"),
        ({"model_digests": ()}, "receipt.model"),
    ],
)
def test_what_the_client_does_not_give_is_a_skip_and_no_pass(case: Case, missing: dict[str, Any], step: str) -> None:
    v = case.check(**missing)
    assert (v.verdict, v.skipped(), v.failed()) == ("NOT VERIFIED", [step], [])
    with pytest.raises(AttestationError, match=step):
        v.require()


@pytest.mark.parametrize("nonce", ["", "x", "0" * 63])
def test_what_is_no_nonce_shows_no_freshness(make_case: Callable[..., Case], nonce: str) -> None:
    """The receipt of a request without a nonce holds an empty one, which must not pass for the client's own."""
    for held in ({"client_nonce": None}, {"client_nonce": nonce}):
        v = make_case(**held).check(client_nonce=nonce)
        assert (v.verdict, v.skipped(), v.failed()) == ("NOT VERIFIED", ["receipt.nonce"], [])
    assert make_case().check().verdict == "VERIFIED"


def test_no_attestation_and_no_steps_are_not_verified(case: Case) -> None:
    v = case.verifier.verify(case.receipt, None, case.expect)
    assert v.verdict == "NOT VERIFIED"
    assert set(v.skipped()) >= {"attestation.format", "quote.signature", "receipt.signature"}
    assert Verification().verdict == "NOT VERIFIED"
    assert Verification([Step("a", "PASS", ""), Step("b", "SKIP", "")]).verdict == "NOT VERIFIED"
    with pytest.raises(AttestationError, match="nothing was checked"):
        Verification().require()


# --- `test` can never pass as real ----------------------------------------------------------------------------------


def test_the_test_provider_is_never_verified(make_case: Callable[..., Case]) -> None:
    case = make_case(TestProvider())
    v = case.check()
    assert v.verdict == "NOT VERIFIED"
    assert v.skipped() == ["quote.signature", "quote.report_data", "quote.measurements"]
    assert "proves nothing" in reason(v, "quote.signature")
    assert "proves nothing" in case.attestation["warning"]


def test_the_test_provider_relabelled_is_refused(make_case: Callable[..., Case]) -> None:
    case = make_case(TestProvider())
    for name in ("tdx", "TDX", "sgx"):
        case.attestation["attestation"]["tee_type"] = name
        assert case.check().failed() == ["quote.signature"]


def test_there_is_no_verifier_for_test() -> None:
    with pytest.raises(AttestationError, match="test"):
        ReceiptVerifier({"test": TdxVerifier(TdxPolicy((synthetic_image(),)), b"")})


def test_the_test_root_is_unreachable_in_production(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same receipt under the production verifiers, whatever the environment says."""
    verifiers = production_verifiers(Policy(tdx=TdxPolicy((synthetic_image(),))))
    for name in ("DCAP_QVL_ROOT", "VERIATTN_TEST_ROOT", "VERIATTN_ATTESTATION", "SGX_ROOT_CA", "INTEL_ROOT_CA"):
        monkeypatch.setenv(name, "test")
    v = ReceiptVerifier(verifiers).verify(case.receipt, case.attestation, case.expect)
    assert v.failed() == ["quote.signature"]
    assert "refused" in reason(v, "quote.signature")


def test_without_a_policy_nothing_is_verified(case: Case) -> None:
    v = ReceiptVerifier(production_verifiers(Policy())).verify(case.receipt, case.attestation, case.expect)
    assert v.verdict == "NOT VERIFIED"
    assert reason(v, "quote.signature") == "no policy with pinned measurements for tdx was given"


def test_json_of_a_verification(case: Case) -> None:
    data = case.check(client_nonce=CLIENT_NONCE).to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["verified"] is True
    assert [s["step"] for s in data["steps"]] == STEPS
    assert len(data["not_verified"]) >= len(receipts.NOT_VERIFIED)
