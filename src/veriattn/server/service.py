"""What the HTTP handlers share: admission, jobs, receipts, the state of the server."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any, cast

from veriattn import __version__
from veriattn.attest.receipts import choice_json, config_digest, sampling_json, verification_event
from veriattn.attest.service import ReceiptService
from veriattn.engine.engine import Engine
from veriattn.errors import ConfigError, ProverUnavailable
from veriattn.server.auth import KeyEntry, KeyStore
from veriattn.server.config import ServerConfig
from veriattn.server.driver import EngineDriver
from veriattn.server.errors import ApiError
from veriattn.server.jobs import Evidence, Job
from veriattn.server.metrics import Metrics
from veriattn.server.planning import ModelFacts, Plan
from veriattn.server.responses import ResponseBuilder
from veriattn.spec.constants import SPEC_VERSION

_PLANNERS = 2


@dataclass(frozen=True)
class Identity:
    """What the server is, for /v1/models and receipts."""

    name: str
    model_digest: str
    strategy: str
    guarantee: str
    max_positions: int

    @property
    def fingerprint(self) -> str:
        return f"veriattn-{__version__}-{self.model_digest[:16]}"

    def to_json(self, created: int, demo: bool) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "veriattn",
            "max_model_len": self.max_positions,
            "veriattn": {
                "model_digest": self.model_digest,
                "spec_version": SPEC_VERSION,
                "strategy": self.strategy,
                "guarantee": self.guarantee,
                "demo": demo,
            },
        }


class Service:
    """State of one server. Everything but the driver is used from the event loop alone."""

    def __init__(
        self,
        config: ServerConfig,
        engine: Engine,
        driver: EngineDriver,
        metrics: Metrics,
        keys: KeyStore,
        receipts: ReceiptService | None,
    ) -> None:
        self.config, self.driver, self.metrics, self.keys, self.receipts = config, driver, metrics, keys, receipts
        self.facts = ModelFacts.of(engine)
        self.identity = Identity(
            config.served_name or engine.path.name,
            engine.model.manifest.digest,
            engine.config.strategy,
            engine.guarantee,
            min(engine.model.manifest.config.max_positions, engine.config.kv_tokens),
        )
        self.effective = config.effective()
        self.draining = False
        # Long prompts are tokenised in threads; a few at a time, so that they cannot crowd out the engine.
        self.planners = asyncio.Semaphore(_PLANNERS)
        self._choices = 0
        self._tokens = 0
        self._job_s = 1.0

    # -- admission ---------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises: ApiError 503 while the server drains or has no prover that passes the checks."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})
        if not self.driver.accepting:
            raise ApiError(
                503, "the server is not ready: no prover passes the checks", "not_ready", headers={"Retry-After": "2"}
            )

    def check_model(self, name: str) -> None:
        """Raises: ApiError 404 for a model that is not served. It has two names: the one served, and its digest."""
        if name not in (self.identity.name, self.identity.model_digest):
            raise ApiError(404, f"the model {name[:100]!r} does not exist", "model_not_found", param="model")

    def admit(self, plan: Plan, caller: KeyEntry, lie_after: int | None) -> Job:
        """Queue a plan. `release` must follow. Raises: ApiError 429 when full."""
        limits, choices, tokens = self.config.limits, len(plan.requests), plan.reserved_tokens
        if tokens > limits.tokens_in_flight:
            raise ApiError(
                413, f"the request reserves {tokens} tokens, more than the {limits.tokens_in_flight} that fit here",
                "request_too_large",
            )  # fmt: skip
        room = self.config.engine.max_sequences + limits.queue_length
        # An empty queue takes any request that fits at all, however many choices it has.
        if self._choices and (self._choices + choices > room or self._tokens + tokens > limits.tokens_in_flight):
            self.metrics.count(self.metrics.refused, "queue_full")
            wait_s = self._job_s * self._choices / (2 * self.config.engine.max_sequences)
            raise ApiError(
                429, "the queue is full; try again later", "queue_full",
                headers={"Retry-After": str(min(60, max(1, math.ceil(wait_s))))},
            )  # fmt: skip
        self.keys.charge_request(caller)
        job = Job([replace(r, owner=caller.id) for r in plan.requests], asyncio.get_running_loop(), lie_after)
        self._choices += choices
        self._tokens += tokens
        self.driver.submit(job)
        return job

    def release(self, job: Job, plan: Plan, caller: KeyEntry, completion_tokens: int, ended: bool) -> None:
        """The request is over; `ended` says whether the engine knows."""
        if not ended:
            self.driver.cancel(job)
        self._choices -= len(plan.requests)
        self._tokens -= plan.reserved_tokens
        self.keys.end_request(caller, plan.prompt_tokens + completion_tokens)
        self._job_s += 0.1 * (asyncio.get_running_loop().time() - job.submitted - self._job_s)

    def refuse_all(self) -> None:
        """The time to drain is over."""
        self.driver.abort_all(ProverUnavailable("the server is shutting down"))

    # -- receipts ----------------------------------------------------------------------------------------------

    def need_receipts(self) -> ReceiptService:
        if self.receipts is None:
            raise ApiError(404, "this server issues no receipts", "receipts_disabled")
        return self.receipts

    def event(self, plan: Plan, builder: ResponseBuilder, evidence: Evidence, nonce: str | None) -> dict[str, Any]:
        """The `gpu.verified` event of a finished response."""
        n = plan.choices_per_prompt
        choices = [
            choice_json(i, c.token_ids, c.finish_reason or "", prompt=i // n, choice=i % n)
            for i, c in enumerate(builder.choices)
        ]
        return verification_event(
            model_digest=self.identity.model_digest,
            strategy=self.identity.strategy,
            guarantee=self.identity.guarantee,
            checks=evidence.checks,
            soundness_bits=evidence.soundness_bits,
            prompts=plan.prompts,
            choices=choices,
            sampling=sampling_json(
                cast(Any, plan.params), max(plan.max_tokens), ignore_eos=plan.requests[0].ignore_eos
            ),
            config=self.effective,
            client_nonce=nonce,
        )

    # -- state -------------------------------------------------------------------------------------------------

    def readiness(self) -> dict[str, Any]:
        """What /ready answers."""
        c = self.driver.condition
        ready = self.driver.ready and not self.draining
        return {
            "ready": ready,
            "state": "draining" if self.draining else c.state,
            "tamper_canary": c.canary,
            "honest_request": c.honest_request,
            "last_fault": c.last_fault,
            "model_digest": self.identity.model_digest,
            "strategy": self.identity.strategy,
            "guarantee": self.identity.guarantee,
            "config_digest": config_digest(self.effective),
            "attestation": None if self.receipts is None else self.receipts.provider_name,
        }

    def reload_keys(self) -> str | None:
        """Read the keys file again; returns what was wrong with it, in which case the old keys stay."""
        try:
            self.keys.reload()
        except ConfigError as e:
            return e.message
        return None
