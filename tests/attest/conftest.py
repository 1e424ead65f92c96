"""A made-up TDX platform, and a server's receipts attested by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, SyntheticTdxProvider, synthetic_image

from veriattn.attest import receipts
from veriattn.attest.policy import TdxPolicy
from veriattn.attest.quotes import TdxVerifier
from veriattn.attest.service import ReceiptService
from veriattn.attest.verify import Expectations, ReceiptVerifier, Verification
from veriattn.spec.sampler import SamplingParams

MODEL_DIGEST = "5" * 64
CLIENT_NONCE, ATTESTATION_NONCE = "c" * 64, "a" * 64
REQUEST, RESPONSE = b'{"messages":[]}', b'{"id":"chatcmpl-1"}'


@pytest.fixture(scope="session")
def platform() -> SyntheticTdx:
    return SyntheticTdx()


def event(**changes: Any) -> dict[str, Any]:
    """An honest event; `changes` go to `verification_event`."""
    arguments: dict[str, Any] = {
        "model_digest": MODEL_DIGEST,
        "strategy": "run-ahead",
        "guarantee": "exact",
        "checks": {"linear_rows": 12, "attention_rows": 6, "elementwise_replayed": 3},
        "soundness_bits": 99,
        "prompts": [[1, 2, 3]],
        "choices": [receipts.choice_json(0, [4, 5], "stop")],
        "sampling": receipts.sampling_json(SamplingParams(temperature=0.7, seed=2**63), 16),
        "config": {"prefill_chunk": 512},
        "client_nonce": CLIENT_NONCE,
    }
    return receipts.verification_event(**{**arguments, **changes})


@dataclass
class Case:
    """An honest receipt with everything that its client knows, to be tampered with."""

    service: ReceiptService
    receipt: dict[str, Any]
    attestation: dict[str, Any]
    expect: Expectations
    verifier: ReceiptVerifier

    def check(self, **changes: Any) -> Verification:
        return self.verifier.verify(self.receipt, self.attestation, replace(self.expect, **changes))


@pytest.fixture
def make_case(platform: SyntheticTdx) -> Callable[..., Case]:
    def make(provider: Any = None, **event_changes: Any) -> Case:
        service = ReceiptService(provider or SyntheticTdxProvider(platform), clock=lambda: float(NOW))
        receipt = service.issue(REQUEST, RESPONSE, event(**event_changes), "key-1", "chatcmpl-1", model="tiny")
        expect = Expectations(
            now=NOW,
            request=REQUEST,
            response=RESPONSE,
            client_nonce=CLIENT_NONCE,
            attestation_nonce=ATTESTATION_NONCE,
            model_digests=(MODEL_DIGEST,),
        )
        policy = TdxPolicy((synthetic_image(),))
        verifier = ReceiptVerifier({"tdx": TdxVerifier(policy, platform.root_der)})
        return Case(service, receipt, service.attestation(ATTESTATION_NONCE), expect, verifier)

    return make


@pytest.fixture
def case(make_case: Callable[..., Case]) -> Case:
    return make_case()
