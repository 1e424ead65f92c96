"""Verification of a receipt: every step by name, PASS, FAIL or SKIP, with the reason. A skip is never a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from veriattn.attest import receipts
from veriattn.attest.canonical import Json
from veriattn.attest.keys import NONCE_PATTERN, KeySet, report_data, signature_holds
from veriattn.attest.providers import TEST_WARNING
from veriattn.attest.quotes import MissingCollateral, QuoteVerifier, VerifiedQuote, hex_field
from veriattn.errors import AttestationError
from veriattn.spec.constants import SPEC_VERSION

Status = Literal["PASS", "FAIL", "SKIP"]
Verdict = Literal["VERIFIED", "NOT VERIFIED", "REFUSED"]

_CLOCK_SKEW_S = 300


@dataclass(frozen=True)
class Step:
    """One check. `name` is stable and machine-readable."""

    name: str
    status: Status
    reason: str

    def to_json(self) -> Json:
        return {"step": self.name, "status": self.status, "reason": self.reason}


@dataclass
class Verification:
    """The outcome of all steps, in order."""

    steps: list[Step] = field(default_factory=list)
    receipt_id: str = ""
    tee_type: str = ""
    image: str = ""
    event: Json = field(default_factory=dict)
    not_verified: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """VERIFIED only if there are steps and every one passed; REFUSED if one failed."""
        if any(s.status == "FAIL" for s in self.steps):
            return "REFUSED"
        return "VERIFIED" if self.steps and all(s.status == "PASS" for s in self.steps) else "NOT VERIFIED"

    def failed(self) -> list[str]:
        return [s.name for s in self.steps if s.status == "FAIL"]

    def skipped(self) -> list[str]:
        return [s.name for s in self.steps if s.status == "SKIP"]

    def require(self) -> None:
        """Raises: AttestationError naming the first step that did not pass."""
        if self.verdict != "VERIFIED":
            step = next((s for s in self.steps if s.status == "FAIL"), None)
            step = step or next(
                (s for s in self.steps if s.status == "SKIP"), Step("none", "SKIP", "nothing was checked")
            )
            raise AttestationError(f"receipt not verified: {step.name}: {step.reason}")

    def to_json(self) -> Json:
        return {
            "verdict": self.verdict,
            "verified": self.verdict == "VERIFIED",
            "receipt_id": self.receipt_id,
            "tee_type": self.tee_type,
            "image": self.image,
            "steps": [s.to_json() for s in self.steps],
            "event": self.event,
            "not_verified": self.not_verified,
        }


@dataclass(frozen=True)
class Expectations:
    """What the client knows of its own: what it sent and received, its nonces, which models it wants, the time.

    Nothing in here may come from the server but `response`. `now` is Unix seconds. `collateral` replaces what the
    evidence brings along. `tls_spki_sha256`, if given, is the hash of the key at the other end of the TLS connection.
    """

    now: int
    request: bytes | None = None
    response: bytes | None = None
    client_nonce: str | None = None
    attestation_nonce: str | None = None
    model_digests: tuple[str, ...] = ()
    min_soundness_bits: int = 98
    collateral: str | None = None
    tls_spki_sha256: str | None = None


def _is_nonce(nonce: str | None) -> bool:
    """An empty one is what a receipt holds of a request that had none: it shows nothing."""
    return nonce is not None and NONCE_PATTERN.fullmatch(nonce) is not None


class _Skip(Exception):
    """A step could not be taken."""


class ReceiptVerifier:
    """Checks a receipt and the attestation it rests on.

     1. receipt.format         the receipt is an aci/1 receipt of this schema
     2. attestation.format     the report is well formed, its key set too
     3. attestation.keyset     the key set hashes to the digest in the report
     4. attestation.nonce      the report answers the client's own nonce
     5. quote.signature        the quote's chain of signatures leads to the maker's root; the platform meets the policy
     6. quote.report_data      the quote carries SHA-256 of the statement over this key set and nonce, recomputed
     7. quote.measurements     the guest is a pinned image
     8. receipt.keyset         the receipt names this key set
     9. receipt.key_window     it was signed within the key set's validity
    10. receipt.signature      the signature holds under a key of the key set
    11. receipt.nonce          the receipt repeats the nonce that the client sent with its request
    12. receipt.request        the hash of the request's raw bytes
    13. receipt.response       the hash of the response's raw bytes
    14. receipt.model          the model is one that the client pinned
    15. receipt.event          the check's own event: verified, exactly, no failures, enough soundness bits
    16. tls.key                (only if asked for) the connection's TLS key belongs to the key set

    Trust: receipt and attestation are adversarial. Steps whose grounds failed are skipped, never assumed.
    `quotes` holds one verifier per TEE type (`quotes.production_verifiers`). There can be none for `test`.
    """

    def __init__(self, quotes: Mapping[str, QuoteVerifier]) -> None:
        if "test" in quotes:
            raise AttestationError("a provider named `test` cannot be verified")
        self._quotes = dict(quotes)

    def verify(self, receipt: Json, attestation: Json | None, expect: Expectations) -> Verification:
        """Take every step. Never raises for what the server sent; `Verification.require` does."""
        return _Run(self._quotes, receipt, attestation, expect).result()

    def verify_attestation(self, attestation: Json | None, expect: Expectations) -> Verification:
        """Steps 2 to 7 and 16 alone: whose keys are these? Needs `attestation_nonce` and `tls_spki_sha256`."""
        return _Run(self._quotes, {}, attestation, expect).result(receipt=False)


class _Run:
    """One verification: what each step found, for those after it."""

    def __init__(
        self, quotes: Mapping[str, QuoteVerifier], receipt: Json, attestation: Json | None, expect: Expectations
    ) -> None:
        self._quotes, self._raw_receipt, self._raw_attestation, self._expect = quotes, receipt, attestation, expect
        self._out = Verification()
        self._receipt: receipts.ParsedReceipt | None = None
        self._report: Json | None = None
        self._keyset: KeySet | None = None
        self._quote: VerifiedQuote | None = None

    def result(self, *, receipt: bool = True) -> Verification:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("receipt.format", self._receipt_format),
            ("attestation.format", self._attestation_format),
            ("attestation.keyset", self._keyset_digest),
            ("attestation.nonce", self._attestation_nonce),
            ("quote.signature", self._quote_signature),
            ("quote.report_data", self._quote_report_data),
            ("quote.measurements", self._quote_measurements),
            ("receipt.keyset", self._receipt_keyset),
            ("receipt.key_window", self._key_window),
            ("receipt.signature", self._signature),
            ("receipt.nonce", self._nonce),
            ("receipt.request", self._request),
            ("receipt.response", self._response),
            ("receipt.model", self._model),
            ("receipt.event", self._event),
        ]
        if self._expect.tls_spki_sha256 is not None or not receipt:
            steps.append(("tls.key", self._tls_key))
        if not receipt:
            steps = [s for s in steps if not s[0].startswith("receipt.")]
        for name, step in steps:
            self._out.steps.append(self._take(name, step))
        return self._out

    @staticmethod
    def _take(name: str, step: Callable[[], str]) -> Step:
        try:
            return Step(name, "PASS", step())
        except (_Skip, MissingCollateral) as e:
            return Step(name, "SKIP", str(e))
        except AttestationError as e:
            return Step(name, "FAIL", e.message)

    def _need_receipt(self) -> receipts.ParsedReceipt:
        if self._receipt is None:
            raise _Skip("the receipt is not well formed")
        return self._receipt

    def _need_keyset(self) -> tuple[Json, KeySet]:
        if self._report is None or self._keyset is None:
            raise _Skip("there is no well-formed attestation report")
        return self._report, self._keyset

    def _receipt_format(self) -> str:
        r = receipts.parse(self._raw_receipt)
        self._receipt = r
        self._out.receipt_id, self._out.event = r.receipt_id, r.event
        self._out.not_verified = [str(n) for n in r.event["not_verified"]]
        return f"{receipts.API_VERSION}, schema {receipts.SCHEMA_VERSION}"

    def _attestation_format(self) -> str:
        report = self._raw_attestation
        if report is None:
            raise _Skip("no attestation report was given")
        inner = report.get("attestation")
        if report.get("api_version") != receipts.API_VERSION or not isinstance(inner, dict):
            raise AttestationError(f"the attestation report is not of {receipts.API_VERSION}")
        if not isinstance(inner.get("tee_type"), str) or not isinstance(inner.get("evidence"), dict):
            raise AttestationError("the attestation report has no tee_type or no evidence")
        keyset = KeySet.from_json(inner.get("workload_keyset"))
        self._report, self._keyset = report, keyset
        self._out.tee_type = inner["tee_type"]
        return f"tee_type {inner['tee_type']}"

    def _keyset_digest(self) -> str:
        report, keyset = self._need_keyset()
        if report.get("workload_keyset_digest") != keyset.digest:
            raise AttestationError("the report's key set does not hash to its workload_keyset_digest")
        return keyset.digest

    def _attestation_nonce(self) -> str:
        report, _ = self._need_keyset()
        if not _is_nonce(self._expect.attestation_nonce):
            raise _Skip("the nonce that the report was asked for with was not given: it may be an old one")
        if report.get("nonce") != self._expect.attestation_nonce:
            raise AttestationError("the attestation report answers another nonce")
        return "the client's own"

    def _quote_signature(self) -> str:
        report, _ = self._need_keyset()
        inner = report["attestation"]
        tee = inner["tee_type"]
        if tee == "test":
            raise _Skip(f"provider `test`: {TEST_WARNING}")
        if tee not in ("tdx", "sev-snp"):
            raise AttestationError(f"unknown tee_type {tee[:40]!r}")
        verifier = self._quotes.get(tee)
        if verifier is None:
            raise _Skip(f"no policy with pinned measurements for {tee} was given")
        self._quote = verifier.verify(inner["evidence"], self._expect.collateral, self._expect.now)
        self._out.not_verified += self._quote.not_verified
        return f"{tee}, {self._quote.status}"

    def _quote_report_data(self) -> str:
        report, keyset = self._need_keyset()
        if self._quote is None:
            raise _Skip("no quote was verified")
        nonce = self._expect.attestation_nonce or report.get("nonce")
        if nonce is not None and not isinstance(nonce, str):
            raise AttestationError("the report's nonce is not text")
        expected = report_data(keyset.digest, nonce)
        if self._quote.report_data != expected:
            raise AttestationError("the quote is not over this key set and nonce")
        if hex_field(report["attestation"], "report_data", 64) != expected:
            raise AttestationError("the report's report_data is not its quote's")
        return "SHA-256 of the statement over key set and nonce"

    def _quote_measurements(self) -> str:
        if self._quote is None:
            raise _Skip("no quote was verified")
        self._out.image = self._quotes[self._quote.tee_type].image(self._quote)
        return f"image {self._out.image}"

    def _receipt_keyset(self) -> str:
        receipt = self._need_receipt()
        _, keyset = self._need_keyset()
        if receipt.keyset_digest != keyset.digest:
            raise AttestationError("the receipt is of another key set than the attested one")
        return "the attested one"

    def _key_window(self) -> str:
        receipt = self._need_receipt()
        _, keyset = self._need_keyset()
        if not keyset.not_before <= receipt.served_at <= keyset.not_after:
            raise AttestationError("the receipt was signed outside of its key set's validity")
        if receipt.served_at > self._expect.now + _CLOCK_SKEW_S:
            raise AttestationError("the receipt is from the future")
        return f"{keyset.not_before} <= {receipt.served_at} <= {keyset.not_after}"

    def _signature(self) -> str:
        receipt = self._need_receipt()
        _, keyset = self._need_keyset()
        public = keyset.public_key(receipt.key_id)
        if public is None:
            raise AttestationError("the receipt's key is not in the key set")
        if not signature_holds(public, receipts.signing_input(receipt.document), receipt.signature):
            raise AttestationError("the signature does not hold: the receipt was altered, or signed with another key")
        return f"{receipt.key_id}, ed25519"

    def _nonce(self) -> str:
        receipt = self._need_receipt()
        if not _is_nonce(self._expect.client_nonce):
            raise _Skip("the nonce that was sent with the request was not given: the receipt may be a replayed one")
        if receipt.event["client_nonce"] != self._expect.client_nonce:
            raise AttestationError("the receipt repeats another nonce: it is a replayed one, or of another request")
        return "the client's own"

    def _request(self) -> str:
        return self._hash("request", self._expect.request, lambda r: r.request_sha256)

    def _response(self) -> str:
        return self._hash("response", self._expect.response, lambda r: r.response_sha256)

    def _hash(self, what: str, body: bytes | None, recorded: Callable[[receipts.ParsedReceipt], str]) -> str:
        receipt = self._need_receipt()
        if body is None:
            raise _Skip(f"the raw bytes of the {what} were not given")
        if "sha256:" + hashlib.sha256(body).hexdigest() != recorded(receipt):
            raise AttestationError(f"the receipt is of another {what}")
        return f"{len(body)} bytes"

    def _model(self) -> str:
        receipt = self._need_receipt()
        digest = receipt.event["model_digest"]
        if not self._expect.model_digests:
            raise _Skip(f"no model digest was pinned; the receipt names {digest}")
        if digest not in self._expect.model_digests:
            raise AttestationError(f"the model is {digest}, which is not a pinned one")
        return str(digest)

    def _event(self) -> str:
        e = self._need_receipt().event
        if e["protocol"] != receipts.PROTOCOL or e["spec_version"] != SPEC_VERSION:
            raise AttestationError(f"the event is of {e['protocol'][:40]}, spec version {e['spec_version']}")
        if e["failures"] != 0:
            raise AttestationError(f"the event counts {e['failures']} failures")
        if e["result"] == "trusted-compute" and e["guarantee"] == "trusted-compute" and e["strategy"] == "full-tee":
            return "full-tee: the TEE computed everything itself"
        if e["result"] != "verified" or e["guarantee"] != "exact":
            raise AttestationError(f"the answer was not verified: result {e['result'][:40]}, {e['guarantee'][:40]}")
        if e["soundness_bits"] < self._expect.min_soundness_bits:
            raise AttestationError(
                f"{e['soundness_bits']} soundness bits, fewer than {self._expect.min_soundness_bits}"
            )
        if not any(type(n) is int and n > 0 for n in e["checks"].values()):
            raise AttestationError("the event counts no checks")
        return f"{e['strategy']}, exact, {e['soundness_bits']} soundness bits, no failures"

    def _tls_key(self) -> str:
        _, keyset = self._need_keyset()
        if self._expect.tls_spki_sha256 is None:
            raise _Skip("the key of the connection was not given")
        if self._expect.tls_spki_sha256 not in {k.spki_sha256 for k in keyset.tls_keys}:
            raise AttestationError("the connection's TLS key is not in the key set: it ends outside of the TEE")
        return "in the key set"
