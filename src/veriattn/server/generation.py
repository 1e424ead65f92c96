"""From a job's events to the bytes of a response: collected, or as server-sent events; receipts and clean ends."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from veriattn.server.auth import KeyEntry
from veriattn.server.errors import ApiError, from_veriattn
from veriattn.server.jobs import Evidence, FailedEvent, Job, TokenEvent
from veriattn.server.planning import Plan
from veriattn.server.responses import DONE, ResponseBuilder, dump, sse
from veriattn.server.service import Service


@dataclass
class Call:
    """One request as its handler sees it."""

    service: Service
    caller: KeyEntry
    plan: Plan
    builder: ResponseBuilder
    request_bytes: bytes
    endpoint: str
    nonce: str | None
    receipt_id: str | None
    include_usage: bool
    trace: bool
    lie_after: int | None


class Generation:
    """The answer to one call. `open` first, then `whole` or `stream`; `close` always."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._job: Job | None = None
        self._pending: TokenEvent | None = None
        self._evidence = Evidence({}, None)
        self._ended = False
        self._deadline = 0.0

    async def open(self) -> None:
        """Queue the job and wait for its first token, so that what fails early fails with a status of its own.

        Raises: ApiError.
        """
        call, limits = self._call, self._call.service.config.limits
        self._job = call.service.admit(call.plan, call.caller, call.lie_after)
        now = asyncio.get_running_loop().time()
        self._deadline = now + limits.request_timeout_s
        self._pending = await self._next(min(self._deadline, now + limits.queue_timeout_s))

    async def _next(self, deadline: float) -> TokenEvent:
        if self._pending is not None:
            held, self._pending = self._pending, None
            return held
        if self._job is None:
            raise RuntimeError("open() comes first")
        try:
            async with asyncio.timeout_at(deadline):
                event = await self._job.events.get()
        except TimeoutError:
            raise ApiError(504, "the request took too long", "request_timeout", headers={"Retry-After": "5"}) from None
        if isinstance(event, FailedEvent):
            self._ended = True
            raise from_veriattn(event.error)
        self._evidence = event.evidence
        return event

    def close(self) -> None:
        """Give back what the job holds; an unfinished one is cancelled. May be called twice."""
        if self._job is not None:
            call, job, self._job = self._call, self._job, None
            call.service.release(job, call.plan, call.caller, call.builder.completion_tokens, self._ended)

    # -- whole -------------------------------------------------------------------------------------------------

    async def whole(self) -> bytes:
        """The body of a response that does not stream. Raises: ApiError."""
        builder = self._call.builder
        while not builder.finished:
            event = await self._next(self._deadline)
            builder.take(event.choice, event.output)
        self._ended = True
        body = dump(builder.whole(self._call.plan.prompt_tokens))
        await self._issue(hashlib.sha256(body).hexdigest())
        return body

    # -- stream ------------------------------------------------------------------------------------------------

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events. After a failure: an error event and no `[DONE]`, so that a client can tell."""
        digest = hashlib.sha256()
        try:
            try:
                async for piece in self._pieces():
                    digest.update(piece)
                    yield piece
            except ApiError as e:
                yield sse(e.body())
                return
            digest.update(DONE)
            # Before the last bytes leave, so that the receipt is there for whoever has read them.
            await self._issue(digest.hexdigest())
            yield DONE
        finally:
            self.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        call, builder = self._call, self._call.builder
        usage = call.include_usage
        for index in range(len(builder.choices)):
            if builder.kind == "chat":
                yield sse(builder.chunk(index, text="", first=True, with_usage=usage))
        while not builder.finished:
            event = await self._next(self._deadline)
            output = event.output
            entries = builder.take(event.choice, output)
            if output.text or entries or call.trace:
                chunk = builder.chunk(event.choice, text=output.text, entries=entries, with_usage=usage)
                yield sse(chunk | self._trace(event))
            if output.finish_reason is not None:
                yield sse(builder.chunk(event.choice, finish_reason=output.finish_reason, with_usage=usage))
        self._ended = True
        if usage:
            yield sse(builder.chunk(None, usage=builder.usage(call.plan.prompt_tokens), with_usage=True))

    def _trace(self, event: TokenEvent) -> dict[str, Any]:
        if not self._call.trace:
            return {}
        verified = self._call.service.identity.guarantee == "exact"
        return {
            "veriattn": {
                "checked": verified,
                "token_id": event.output.token_id,
                "verification_lag_ms": round(1000 * event.lag_s, 3),
                "checks": event.evidence.checks,
            }
        }

    async def _issue(self, response_sha256: str) -> None:
        call, service = self._call, self._call.service
        if service.receipts is None or call.receipt_id is None:
            return
        event = service.event(call.plan, call.builder, self._evidence, call.nonce)
        await asyncio.to_thread(
            service.receipts.issue,
            call.request_bytes,
            None,
            event,
            call.caller.id,
            call.builder.id,
            receipt_id=call.receipt_id,
            model=service.identity.name,
            endpoint=call.endpoint,
            response_sha256=response_sha256,
        )
        service.metrics.receipts.inc()
