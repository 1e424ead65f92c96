"""Verification of quotes: signature chains to the maker's root, state of the platform, pinned measurements.

The roots are constants. There is no switch, setting or environment variable that adds one: a verifier for another root is
another object, which only code can make (the tests do, for their own root).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509

from veriattn.attest.canonical import Json
from veriattn.attest.policy import Policy, SevSnpPolicy, TdxPolicy
from veriattn.errors import AttestationError

#: Intel SGX Root CA, the root of TDX quotes too.
INTEL_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
INTEL_ROOT_DER = base64.b64decode(
    "MIICjzCCAjSgAwIBAgIUImUM1lqdNInzg7SVUr9QGzknBqwwCgYIKoZIzj0EAwIwaDEaMBgGA1UEAwwRSW50ZWwgU0dYIFJvb3QgQ0ExGjAY"
    "BgNVBAoMEUludGVsIENvcnBvcmF0aW9uMRQwEgYDVQQHDAtTYW50YSBDbGFyYTELMAkGA1UECAwCQ0ExCzAJBgNVBAYTAlVTMB4XDTE4MDUy"
    "MTEwNDUxMFoXDTQ5MTIzMTIzNTk1OVowaDEaMBgGA1UEAwwRSW50ZWwgU0dYIFJvb3QgQ0ExGjAYBgNVBAoMEUludGVsIENvcnBvcmF0aW9u"
    "MRQwEgYDVQQHDAtTYW50YSBDbGFyYTELMAkGA1UECAwCQ0ExCzAJBgNVBAYTAlVTMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEC6nEwMDI"
    "YZOj/iPWsCzaEKi71OiOSLRFhWGjbnBVJfVnkY4u3IjkDYYL0MxO4mqsyYjlBalTVYxFP2sJBK5zlKOBuzCBuDAfBgNVHSMEGDAWgBQiZQzW"
    "Wp00ifODtJVSv1AbOScGrDBSBgNVHR8ESzBJMEegRaBDhkFodHRwczovL2NlcnRpZmljYXRlcy50cnVzdGVkc2VydmljZXMuaW50ZWwuY29t"
    "L0ludGVsU0dYUm9vdENBLmRlcjAdBgNVHQ4EFgQUImUM1lqdNInzg7SVUr9QGzknBqwwDgYDVR0PAQH/BAQDAgEGMBIGA1UdEwEB/wQIMAYB"
    "Af8CAQEwCgYIKoZIzj0EAwIDSQAwRgIhAOW/5QkR+S9CiSDcNoowLuPRLsWGf/Yi7GSX94BgwTwgAiEA4J0lrHoMs+Xo5o/sX6O9QWxHRAvZ"
    "UGOdRQ7cvqRXaqI="
)
MAX_QUOTE_BYTES = 64 << 10
MAX_COLLATERAL_BYTES = 1 << 20

_ZERO_MR = "00" * 48
_SNP_MIGRATE_MA = 1 << 18  # of the guest policy (AMD 56860, table of POLICY)
_SNP_CERTIFICATES = {
    "ark": uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),
    "ask": uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),
    "vcek": uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"),
}


@dataclass(frozen=True)
class VerifiedQuote:
    """What a quote says, after its signature held and its platform met the policy. Measurements are hex."""

    tee_type: str
    report_data: bytes
    measurements: Mapping[str, str]
    status: str
    not_verified: tuple[str, ...] = field(default=())


class QuoteVerifier(Protocol):
    """One kind of TEE under one policy. Both methods raise AttestationError with the reason."""

    def verify(self, evidence: Json, collateral: str | None, now: int) -> VerifiedQuote:
        """Check the chain of signatures and the platform's state at time `now` (Unix seconds)."""
        ...

    def image(self, quote: VerifiedQuote) -> str:
        """The name of the pinned image whose measurements these are, all of them."""
        ...


class MissingCollateral(AttestationError):
    """The maker's collateral is needed and was not given: nothing is known to be wrong."""

    code = "collateral_missing"


def hex_field(evidence: Json, name: str, limit: int) -> bytes:
    """A member of the evidence as bytes. Raises: AttestationError."""
    value = evidence.get(name)
    if not isinstance(value, str) or len(value) > 2 * limit:
        raise AttestationError(f"the evidence has no {name}, or it is too long")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise AttestationError(f"the evidence's {name} is not hexadecimal") from None


class TdxVerifier:
    """Intel TDX under a policy with pinned measurements.

    root_der: the root certificate. Production code takes Intel's (`production_verifiers`).
    Trust: evidence and collateral are adversarial; the collateral is signed and its expiry is checked at `now`.
    """

    def __init__(self, policy: TdxPolicy, root_der: bytes) -> None:
        self._policy, self._root = policy, root_der

    def verify(self, evidence: Json, collateral: str | None, now: int) -> VerifiedQuote:
        try:
            import dcap_qvl  # noqa: PLC0415 - an extra
        except ImportError:
            raise MissingCollateral(
                "TDX quotes cannot be checked here: the package dcap-qvl is not installed",
                hint="pip install 'veriattn[attest]'",
            ) from None

        raw = hex_field(evidence, "quote", MAX_QUOTE_BYTES)
        text = collateral if collateral is not None else evidence.get("collateral")
        if text is None:
            raise MissingCollateral(
                "no collateral: Intel's signed certificates, revocation lists and TCB levels for this platform",
                hint="give --collateral FILE, or --fetch-collateral",
            )
        if not isinstance(text, str) or len(text) > MAX_COLLATERAL_BYTES:
            raise AttestationError("the collateral is not text, or too long")
        policy = self._policy
        try:
            parsed = dcap_qvl.QuoteCollateralV3.from_json(text)
            limits = (
                dcap_qvl.QuotePolicy.strict(now)
                .allow_dynamic_platform(True)
                .allow_cached_keys(True)
                .allow_smt(policy.allow_smt)
                .min_tcb_eval_data_number(policy.min_tcb_evaluation_data_number)
                .reject_advisories(list(policy.rejected_advisories))
            )
            for status in policy.accepted_statuses:
                limits = limits.allow_status(status)
            claims = json.loads(
                dcap_qvl.QuoteVerifier(self._root).verify_with_policy(raw, parsed, now, limits).to_json()
            )
            quote = dcap_qvl.parse_quote(raw)
        except ValueError as e:
            raise AttestationError(f"the TDX quote is refused: {_one_line(e)}", hint=_tdx_hint(str(e))) from None
        if not quote.is_tdx():
            raise AttestationError("the quote is not of a TDX guest")
        report = quote.report
        if any(getattr(report, "mr_service_td", b"")):
            raise AttestationError("the TDX guest has a service TD bound to it, which is not measured here")
        if report.td_attributes[0] != 0:
            raise AttestationError("the TDX guest runs in debug mode: its memory is open to the host")
        names = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "mr_config_id", "mr_owner", "mr_owner_config")
        status = str(claims["tcb"]["status"])
        return VerifiedQuote("tdx", report.report_data, {n: getattr(report, n).hex() for n in names}, status)

    def image(self, quote: VerifiedQuote) -> str:
        for image in self._policy.images:
            if {**image.optional(_ZERO_MR), **image.required()} == dict(quote.measurements):
                return image.name
        raise AttestationError(
            "the guest's measurements are those of no pinned image: " + self._differences(quote),
            hint="pin the measurements of the image that you built or audited",
        )

    def _differences(self, quote: VerifiedQuote) -> str:
        parts = []
        for image in self._policy.images:
            wanted = {**image.optional(_ZERO_MR), **image.required()}
            odd = [n for n, v in quote.measurements.items() if wanted[n] != v]
            parts.append(f"{image.name} differs in {', '.join(odd)}")
        return "; ".join(parts)


class SevSnpVerifier:
    """AMD SEV-SNP under a policy with pinned measurements and a pinned AMD root (ARK), by its SHA-256.

    What is not checked: AMD's revocation list (no offline copy is asked for); reports signed with a VLEK are refused.
    """

    def __init__(self, policy: SevSnpPolicy) -> None:
        self._policy = policy

    def verify(self, evidence: Json, collateral: str | None, now: int) -> VerifiedQuote:
        try:
            import omne_attest  # noqa: PLC0415 - an extra
        except ImportError:
            raise MissingCollateral(
                "SEV-SNP reports cannot be checked here: the package omne-attest is not installed",
                hint="pip install 'veriattn[attest]'",
            ) from None
        report = hex_field(evidence, "report", MAX_QUOTE_BYTES)
        certificates = self._certificates(evidence)
        for name, der in certificates.items():
            _check_dates(name, der, now)
        floor = self._policy.tcb_floor
        try:
            r = omne_attest.verify(
                report,
                certificates["vcek"],
                certificates["ask"],
                certificates["ark"],
                bytes.fromhex(self._policy.ark_sha256),
                omne_attest.Policy(tcb_floor=omne_attest.Tcb(**floor), max_vmpl=self._policy.max_vmpl),
            )
        except (omne_attest.Fail, ValueError) as e:
            raise AttestationError(f"the SEV-SNP report is refused: {_one_line(e)}") from None
        if r.policy & _SNP_MIGRATE_MA:
            # The agent is a guest of the host's choice, which the launch measurement does not cover.
            raise AttestationError("the SEV-SNP guest's policy allows a migration agent, which could read its memory")
        return VerifiedQuote(
            "sev-snp",
            r.report_data,
            {"measurement": r.measurement.hex(), "host_data": r.host_data.hex()},
            f"TCB {r.reported_tcb}",
            ("AMD's certificate revocation list",),
        )

    def image(self, quote: VerifiedQuote) -> str:
        for image in self._policy.images:
            if {"measurement": image.measurement, "host_data": image.host_data} == dict(quote.measurements):
                return image.name
        raise AttestationError(
            f"the guest's launch measurement {quote.measurements['measurement'][:16]}... or its host data is not pinned",
            hint="pin the measurements of the image that you built or audited",
        )

    @staticmethod
    def _certificates(evidence: Json) -> dict[str, bytes]:
        if "certificates" not in evidence:
            return {name: hex_field(evidence, name, 16 << 10) for name in _SNP_CERTIFICATES}
        table = certificate_table(hex_field(evidence, "certificates", MAX_QUOTE_BYTES))
        missing = sorted(set(_SNP_CERTIFICATES) - set(table))
        if missing:
            raise MissingCollateral(
                f"the host's certificate table lacks {', '.join(missing)}",
                hint="load AMD's certificates on the host, or add vcek, ask and ark to the evidence",
            )
        return table


def certificate_table(raw: bytes) -> dict[str, bytes]:
    """The certificates (DER) of a SEV-SNP certificate table that are known here. Raises: AttestationError."""
    out: dict[str, bytes] = {}
    for at in range(0, len(raw) - 23, 24):
        guid, (offset, length) = raw[at : at + 16], struct.unpack_from("<II", raw, at + 16)
        if not any(guid):
            break
        if offset + length > len(raw):
            raise AttestationError("the SEV-SNP certificate table points outside of itself")
        for name, known in _SNP_CERTIFICATES.items():
            if guid in (known.bytes, known.bytes_le):
                out[name] = raw[offset : offset + length]
    return out


def _check_dates(name: str, der: bytes, now: int) -> None:
    try:
        certificate = x509.load_der_x509_certificate(der)
    except ValueError:
        raise AttestationError(f"the {name.upper()} certificate does not parse") from None
    at = datetime.datetime.fromtimestamp(now, datetime.UTC)
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        raise AttestationError(f"the {name.upper()} certificate is not valid at {at:%Y-%m-%d}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _tdx_hint(message: str) -> str | None:
    if "xpired" in message:
        return "fetch fresh collateral; --at checks an old receipt as of its own time"
    if "status" in message.lower():
        return "the platform's firmware is not up to date: its operator must update it"
    return None


def production_verifiers(policy: Policy) -> dict[str, QuoteVerifier]:
    """The verifiers of a policy: Intel's root and the policy's AMD root, nothing else, and none for `test`."""
    if hashlib.sha256(INTEL_ROOT_DER).hexdigest() != INTEL_ROOT_SHA256:
        raise AttestationError("the built-in Intel root is damaged", hint="install veriattn again")
    out: dict[str, QuoteVerifier] = {}
    if policy.tdx is not None:
        out["tdx"] = TdxVerifier(policy.tdx, INTEL_ROOT_DER)
    if policy.sev_snp is not None:
        out["sev-snp"] = SevSnpVerifier(policy.sev_snp)
    return out
