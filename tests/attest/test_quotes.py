"""Quotes: a real one of TDX, a real one of SEV-SNP, and those of a made-up platform, under right and wrong policies."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.attest.synthetic_snp import DEBUG, HONEST_POLICY, MEASUREMENT, MIGRATE_MA, SINGLE_SOCKET, SyntheticSnp
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, synthetic_image

from veriattn.attest.policy import MILAN_ARK_SHA256, Policy, SevSnpImage, SevSnpPolicy, TdxImage, TdxPolicy
from veriattn.attest.quotes import (
    INTEL_ROOT_DER,
    MissingCollateral,
    SevSnpVerifier,
    TdxVerifier,
    certificate_table,
    production_verifiers,
)
from veriattn.errors import AttestationError, ConfigError

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
# AMD gives its VCEK certificates the serial number 0.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")
GOOD_TIME, EXPIRED = 1751673600, 1775215318


@pytest.fixture(scope="module")
def real() -> tuple[dict[str, Any], str]:
    quote, collateral = (VECTORS / "quote.bin").read_bytes(), (VECTORS / "collateral.json").read_bytes()
    assert hashlib.sha256(quote).hexdigest() == "c42f9164325024bca2757bc8819b11879a0a369132ea4e2b7c85df4805ea72db"
    assert hashlib.sha256(collateral).hexdigest() == "b0a5f5fd620a8881b1eda45261fdf30dd930b49aff93231556645c81fcb4c0bc"
    return {"quote": quote.hex()}, collateral.decode()


def intel(images: tuple[TdxImage, ...] = (synthetic_image(),), **policy: Any) -> Any:
    return production_verifiers(Policy(tdx=TdxPolicy(images, **policy)))["tdx"]


def test_the_built_in_root_is_intels() -> None:
    assert (
        hashlib.sha256(INTEL_ROOT_DER).hexdigest() == "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
    )


def test_the_real_quote_is_up_to_date_at_its_time(real: tuple[dict[str, Any], str]) -> None:
    quote = intel().verify(*real, GOOD_TIME)
    assert (quote.tee_type, quote.status) == ("tdx", "UpToDate")
    assert len(quote.report_data) == 64


def test_the_real_quote_is_refused_once_its_collateral_has_expired(real: tuple[dict[str, Any], str]) -> None:
    for now in (EXPIRED, NOW):
        with pytest.raises(AttestationError, match="CrlExpired") as caught:
            intel().verify(*real, now)
        assert "collateral" in (caught.value.hint or "")


def test_the_real_quotes_measurements_must_be_pinned(real: tuple[dict[str, Any], str]) -> None:
    quote = intel().verify(*real, GOOD_TIME)
    pinned = TdxImage("real", **quote.measurements)
    assert intel((synthetic_image(), pinned)).image(quote) == "real"
    with pytest.raises(AttestationError, match="no pinned image"):
        intel().image(quote)
    for name in quote.measurements:
        wrong = replace(pinned, **{name: "ab" * 48})
        with pytest.raises(AttestationError, match=f"real differs in {name}$"):
            intel((wrong,)).image(quote)


def test_measurements_of_two_images_do_not_mix(platform: SyntheticTdx) -> None:
    verifier = TdxVerifier(TdxPolicy((synthetic_image("a"), synthetic_image("b"))), platform.root_der)
    quote = verifier.verify({"quote": platform.quote(bytes(64), image="a").hex()}, platform.collateral, NOW)
    assert verifier.image(quote) == "a"
    mixed = replace(quote, measurements={**quote.measurements, "rt_mr3": synthetic_image("b").rt_mr3})
    with pytest.raises(AttestationError, match="no pinned image"):
        verifier.image(mixed)


def test_owners_registers_must_be_zero_unless_pinned(real: tuple[dict[str, Any], str]) -> None:
    quote = intel().verify(*real, GOOD_TIME)
    needed = {n: v for n, v in quote.measurements.items() if n.startswith(("mr_td", "rt_"))}
    image = TdxImage("real", **needed)
    zero = replace(
        quote, measurements={**needed, **dict.fromkeys(("mr_config_id", "mr_owner", "mr_owner_config"), "00" * 48)}
    )
    assert intel((image,)).image(zero) == "real"
    with pytest.raises(AttestationError, match=r"mr_owner$"):
        intel((image,)).image(replace(zero, measurements={**zero.measurements, "mr_owner": "01" * 48}))


def test_the_synthetic_quote_under_its_own_root_only(platform: SyntheticTdx) -> None:
    data = bytes(range(64))
    evidence = {"quote": platform.quote(data).hex(), "collateral": platform.collateral}
    quote = TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der).verify(evidence, None, NOW)
    assert (quote.report_data, quote.status) == (data, "UpToDate")
    with pytest.raises(AttestationError, match="refused"):
        intel().verify(evidence, None, NOW)
    with pytest.raises(AttestationError, match="refused"):
        TdxVerifier(TdxPolicy((synthetic_image(),)), SyntheticTdx().root_der).verify(evidence, None, NOW)


def test_a_debug_guest_is_refused(platform: SyntheticTdx) -> None:
    verifier = TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der)
    with pytest.raises(AttestationError, match=r"[Dd]ebug"):
        verifier.verify({"quote": platform.quote(bytes(64), debug=True).hex()}, platform.collateral, NOW)


@pytest.mark.parametrize("status", ["OutOfDate", "Revoked", "SWHardeningNeeded", "ConfigurationNeeded"])
def test_platforms_that_are_not_up_to_date(status: str) -> None:
    platform = SyntheticTdx(status)
    evidence = {"quote": platform.quote(bytes(64)).hex()}
    with pytest.raises(AttestationError, match="refused"):
        TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der).verify(evidence, platform.collateral, NOW)
    if status in ("OutOfDate", "Revoked"):
        with pytest.raises(ConfigError, match="cannot be accepted"):
            TdxPolicy((synthetic_image(),), accepted_statuses=(status,))
    else:
        lenient = TdxPolicy((synthetic_image(),), accepted_statuses=(status,))
        assert TdxVerifier(lenient, platform.root_der).verify(evidence, platform.collateral, NOW).status == status


def test_expiry_is_checked_at_the_given_time(platform: SyntheticTdx) -> None:
    verifier = TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der)
    evidence = {"quote": platform.quote(bytes(64)).hex()}
    for now in (0, NOW + 20 * 365 * 86400):
        with pytest.raises(AttestationError, match="refused"):
            verifier.verify(evidence, platform.collateral, now)


def test_collateral_of_an_older_evaluation_is_refused(platform: SyntheticTdx) -> None:
    policy = TdxPolicy((synthetic_image(),), min_tcb_evaluation_data_number=2)
    with pytest.raises(AttestationError, match="refused"):
        TdxVerifier(policy, platform.root_der).verify(
            {"quote": platform.quote(bytes(64)).hex()}, platform.collateral, NOW
        )


def test_missing_collateral_is_told_apart(platform: SyntheticTdx) -> None:
    with pytest.raises(MissingCollateral) as caught:
        intel().verify({"quote": platform.quote(bytes(64)).hex()}, None, NOW)
    assert caught.value.code == "collateral_missing"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_quote_with_any_byte_changed_is_refused_or_unchanged_in_content(
    data: st.DataObject, platform: SyntheticTdx
) -> None:
    """No change is accepted but of bytes that nothing is read from: report and measurements stay what was signed."""
    verifier = TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der)
    raw = bytearray(platform.quote(bytes(range(64))))
    honest = verifier.verify({"quote": raw.hex()}, platform.collateral, NOW)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = verifier.verify({"quote": raw.hex()}, platform.collateral, NOW)
    except AttestationError:
        return
    assert changed == honest
    assert at >= 632


@pytest.mark.parametrize(
    "evidence", [{}, {"quote": "zz"}, {"quote": ""}, {"quote": 5}, {"quote": "00" * 5000}, {"quote": "0" * (1 << 20)}]
)
def test_damaged_evidence(evidence: dict[str, Any], platform: SyntheticTdx) -> None:
    with pytest.raises(AttestationError):
        intel().verify(evidence, platform.collateral, NOW)
    with pytest.raises(AttestationError):
        intel().verify({"quote": platform.quote(bytes(64)).hex()}, "{}", NOW)


# --- SEV-SNP --------------------------------------------------------------------------------------------------------
# omne-attest brings along a real report of an AMD Milan guest and its certificates. The guest was started with the
# debug bit, so everything holds but the policy.

MILAN_TIME = NOW
TCB_FLOOR = {"boot_loader": 0, "tee": 0, "snp": 0, "microcode": 0}


@pytest.fixture(scope="module")
def snp() -> dict[str, str]:
    vectors = pytest.importorskip("omne_attest.vectors")
    return {
        "report": vectors.attestation().hex(),
        "vcek": vectors.vcek().hex(),
        "ask": vectors.ask().hex(),
        "ark": vectors.ark().hex(),
    }


def snp_verifier(**changes: Any) -> SevSnpVerifier:
    image = SevSnpImage("milan", "11" * 48)
    return SevSnpVerifier(SevSnpPolicy((image,), TCB_FLOOR, **changes))


def test_the_real_snp_report_is_refused_for_its_debug_bit_alone(snp: dict[str, str]) -> None:
    with pytest.raises(AttestationError, match="allows debug"):
        snp_verifier().verify(snp, None, MILAN_TIME)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"report": None}, "signature does not verify"),
        ({"ark_sha256": "00" * 32}, "pinned ARK"),
        ({"vcek": "ask"}, "not a P-384"),
        ({"ask": "vcek"}, "chain broken"),
        ({"report": "00"}, "bytes, expected"),
    ],
)
def test_snp_failures_by_name(snp: dict[str, str], change: dict[str, Any], fragment: str) -> None:
    policy = {k: v for k, v in change.items() if k == "ark_sha256"}
    evidence = dict(snp)
    for name, value in change.items():
        if name == "report" and value is None:
            raw = bytearray.fromhex(snp["report"])
            raw[0x50] ^= 1
            evidence["report"] = raw.hex()
        elif name != "ark_sha256":
            evidence[name] = snp.get(value, value)
    with pytest.raises(AttestationError, match=fragment):
        snp_verifier(**policy).verify(evidence, None, MILAN_TIME)


def test_a_guest_that_its_host_could_look_into_is_refused() -> None:
    """A policy is the host's word at launch, and no part of the measurement: an agent of its own could migrate the guest."""
    pytest.importorskip("omne_attest")
    platform, data = SyntheticSnp(), bytes(range(64))
    image = SevSnpImage("milan", MEASUREMENT.hex())
    verifier = SevSnpVerifier(SevSnpPolicy((image,), TCB_FLOOR, ark_sha256=platform.ark_sha256))
    for policy in (HONEST_POLICY, HONEST_POLICY | SINGLE_SOCKET):
        quote = verifier.verify(platform.evidence(data, policy=policy), None, NOW)
        assert (quote.report_data, verifier.image(quote)) == (data, "milan")
    for options, fragment in (
        ({"policy": HONEST_POLICY | MIGRATE_MA}, "migration agent"),
        ({"policy": HONEST_POLICY | DEBUG}, "allows debug"),
        ({"vmpl": 1}, "VMPL 1"),
    ):
        with pytest.raises(AttestationError, match=fragment):
            verifier.verify(platform.evidence(data, **options), None, NOW)
    with pytest.raises(AttestationError, match="pinned ARK"):
        snp_verifier().verify(platform.evidence(data), None, NOW)


def test_snp_certificates_expire(snp: dict[str, str]) -> None:
    with pytest.raises(AttestationError, match="is not valid at"):
        snp_verifier().verify(snp, None, 4102444800)


def test_snp_certificate_table(snp: dict[str, str]) -> None:
    names = {
        "ark": "c0b406a4-a803-4952-9743-3fb6014cd0ae",
        "ask": "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "vcek": "63da758d-e664-4564-adc5-f4b93be8accd",
    }
    ders = {n: bytes.fromhex(snp[n]) for n in names}
    for order in ("bytes", "bytes_le"):
        table, at = b"", 24 * 4
        for n, der in ders.items():
            table += getattr(uuid.UUID(names[n]), order) + struct.pack("<II", at, len(der))
            at += len(der)
        raw = table + bytes(24) + b"".join(ders.values())
        assert certificate_table(raw) == ders
        with pytest.raises(AttestationError, match="allows debug"):
            snp_verifier().verify({"report": snp["report"], "certificates": raw.hex()}, None, MILAN_TIME)
        with pytest.raises(AttestationError, match="outside of itself"):
            certificate_table(raw[:200])
    with pytest.raises(MissingCollateral, match="lacks ark, ask, vcek"):
        snp_verifier().verify({"report": snp["report"], "certificates": ""}, None, MILAN_TIME)


def test_snp_measurement_is_pinned() -> None:
    from veriattn.attest.quotes import VerifiedQuote

    quote = VerifiedQuote("sev-snp", bytes(64), {"measurement": "11" * 48, "host_data": "00" * 32}, "")
    assert snp_verifier().image(quote) == "milan"
    for name in ("measurement", "host_data"):
        with pytest.raises(AttestationError, match="not pinned"):
            snp_verifier().image(replace(quote, measurements={**quote.measurements, name: "22" * 48}))


# --- policies -------------------------------------------------------------------------------------------------------


def policy_json() -> dict[str, Any]:
    image = {"name": "image", **synthetic_image().required()}
    return {
        "format": "veriattn-policy/1",
        "tdx": {"images": [image]},
        "sev-snp": {"images": [{"name": "x", "measurement": "11" * 48}], "tcb_floor": TCB_FLOOR},
        "model_digests": ["5" * 64],
    }


def test_a_policy_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy_json()))
    policy = Policy.load(path)
    assert policy.tdx is not None
    assert policy.tdx.images == (synthetic_image(),)
    assert policy.sev_snp is not None
    assert policy.sev_snp.ark_sha256 == MILAN_ARK_SHA256
    assert set(production_verifiers(policy)) == {"tdx", "sev-snp"}


@pytest.mark.parametrize(
    "path",
    [
        ("format",),
        ("tdx", "images"),
        ("tdx", "images", 0, "mr_td"),
        ("tdx", "images", 0, "rt_mr0"),
        ("tdx", "images", 0, "rt_mr1"),
        ("tdx", "images", 0, "rt_mr2"),
        ("tdx", "images", 0, "rt_mr3"),
        ("sev-snp", "images"),
        ("sev-snp", "tcb_floor"),
        ("sev-snp", "images", 0, "measurement"),
    ],
)
def test_a_policy_without_measurements_is_refused(path: tuple[Any, ...]) -> None:
    for change in ("missing", "empty"):
        data: Any = policy_json()
        at = data
        for key in path[:-1]:
            at = at[key]
        if change == "missing":
            del at[path[-1]]
        else:
            at[path[-1]] = [] if path[-1] == "images" else ""
        with pytest.raises(ConfigError):
            Policy.from_json(data)


def test_unknown_members_of_a_policy_are_refused() -> None:
    for where in ((), ("tdx",), ("sev-snp",)):
        data: Any = policy_json()
        at = data
        for key in where:
            at = at[key]
        at["allow_test"] = True
        with pytest.raises(ConfigError, match="allow_test"):
            Policy.from_json(data)
