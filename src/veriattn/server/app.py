"""The HTTP application: OpenAI's endpoints, health, metrics, receipts and attestation, the page."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from veriattn import __version__
from veriattn.attest.keys import check_nonce
from veriattn.attest.receipts import API_VERSION, KEYSET_HEADER, NONCE_HEADER, RECEIPT_HEADER, VERSION_HEADER
from veriattn.errors import AttestationBusy, ReceiptNotFound, UsageError, VeriattnError
from veriattn.server.auth import KeyEntry
from veriattn.server.errors import ApiError, from_veriattn
from veriattn.server.generation import Call, Generation
from veriattn.server.middleware import Outermost
from veriattn.server.planning import Plan, plan_chat, plan_completion
from veriattn.server.responses import Kind, ResponseBuilder, dump
from veriattn.server.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from veriattn.server.service import Service

_PAGE = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
T = TypeVar("T")
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)


async def caller(request: Request) -> KeyEntry:
    """Whose request this is. Raises: ApiError 401."""
    entry: KeyEntry = request.app.state.service.keys.authenticate(request.headers.get("authorization"))
    request.state.key_id = entry.id
    return entry


Caller = Annotated[KeyEntry, Depends(caller)]
_NONCE: dict[str, Any] = {"pattern": "^[0-9a-f]{64}$"}  # told here, checked where it is used
Nonce = Annotated[str, Query(max_length=200, json_schema_extra=_NONCE)]
OptionalText = Annotated[str | None, Query(max_length=200)]


class JsonResponse(Response):
    """JSON bytes as they are."""

    media_type = "application/json"


class _EventStream(StreamingResponse):
    """Ends its generation whatever becomes of the connection."""

    def __init__(self, generation: Generation, on_end: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(generation.stream(), media_type="text/event-stream", headers=headers)
        self._generation, self._on_end = generation, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()
            self._on_end()


def create_app(service: Service) -> FastAPI:
    """The application over a service whose driver has been started."""
    config = service.config
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.driver.stop)

    app = FastAPI(
        title="veriattn",
        version=__version__,
        description="OpenAI-compatible inference whose every step has been checked.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", NONCE_HEADER, "X-Request-Id"],
            expose_headers=[RECEIPT_HEADER, VERSION_HEADER, KEYSET_HEADER, "X-Request-Id"],
        )
    app.add_middleware(
        Outermost,
        body_bytes=config.limits.body_bytes,
        local_only=not (config.keys_file or config.anonymous),
        origins=config.cors_origins,
    )
    _add_error_handlers(app, service)

    app.state.service = service

    # -- generation --------------------------------------------------------------------------------------------

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, who: Caller, body: ChatCompletionRequest) -> Response:
        plan = partial(plan_chat, body, service.facts, config.limits)
        return await _generate(service, request, who, body, "chat", plan, bool(body.logprobs))

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, who: Caller, body: CompletionRequest) -> Response:
        plan = partial(plan_completion, body, service.facts, config.limits)
        return await _generate(service, request, who, body, "completion", plan, body.logprobs is not None)

    # -- models, health ----------------------------------------------------------------------------------------

    @app.get("/v1/models", response_model=None)
    async def models(who: Caller) -> Response:
        return JsonResponse(dump({"object": "list", "data": [service.identity.to_json(created, config.demo)]}))

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str, who: Caller) -> Response:
        service.check_model(name)
        return JsonResponse(dump(service.identity.to_json(created, config.demo)))

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Alive: the engine's thread runs."""
        alive = service.driver.alive
        return JsonResponse(dump({"status": "ok" if alive else "dead"}), status_code=200 if alive else 503)

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Ready: the canary was caught, an honest step has passed, a prover is there, the server does not drain."""
        state = service.readiness()
        return JsonResponse(dump(state), status_code=200 if state["ready"] else 503)

    @app.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        if config.metrics_need_key:
            await caller(request)
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_receipt_routes(app, service)
    if config.page:
        _add_page(app)
    # Last: the document is made anew when a route is added.
    _describe(app, service)
    return app


def _describe(app: FastAPI, service: Service) -> None:
    """Put what is particular to this server into its OpenAPI document: the model's names, the lengths that fit."""
    schemas = app.openapi()["components"]["schemas"]
    identity = service.identity
    for body in ("ChatCompletionRequest", "CompletionRequest"):
        properties = schemas[body]["properties"]
        properties["model"]["enum"] = [identity.name, identity.model_digest]
        properties["n"]["anyOf"][0]["maximum"] = service.config.limits.max_choices
        for name in ("max_tokens", "max_completion_tokens"):
            if name in properties:
                properties[name]["anyOf"][0]["maximum"] = identity.max_positions - 1


async def _generate(
    service: Service,
    request: Request,
    who: KeyEntry,
    body: GenerationRequest,
    kind: Kind,
    make_plan: Callable[[], Plan],
    logprobs: bool,
) -> Response:
    service.check_open()
    service.check_model(body.model)
    nonce = request.headers.get(NONCE_HEADER)
    if nonce is not None:
        check_nonce(nonce)
    extension = body.veriattn
    lie_after = None
    if extension is not None and extension.lie:
        if not service.config.demo:
            raise ApiError(403, "this server was not started with --demo", "demo_only", param="veriattn")
        lie_after = 3 + secrets.randbelow(6)
    async with service.planners:
        plan = await asyncio.to_thread(make_plan)
    receipt_id = None if service.receipts is None else service.receipts.new_receipt_id()
    builder = ResponseBuilder(
        kind, service.identity.name, service.facts.codec, len(plan.requests), service.identity.fingerprint, logprobs
    )
    generation = Generation(
        Call(
            service, who, plan, builder, await request.body(), request.url.path, nonce, receipt_id,
            body.include_usage, extension is not None and extension.events, lie_after,
        )
    )  # fmt: skip
    headers = _receipt_headers(service, receipt_id)

    def note_usage() -> None:
        request.state.usage = builder.usage(plan.prompt_tokens)

    handed_over = False
    try:
        # The stream watches for the client's end itself; until it begins, and for whole responses, we do.
        await _unless_disconnected(request, generation.open())
        if body.stream:
            headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
            response: Response = _EventStream(generation, note_usage, headers)
            handed_over = True
            return response
        return JsonResponse(await _unless_disconnected(request, generation.whole()), headers=headers)
    finally:
        if not handed_over:
            generation.close()
            note_usage()


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, unless the client goes away first; then it is cancelled. Raises: ApiError 499."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone away", "client_disconnected")
        return task.result()
    finally:
        for t in (task, gone):
            t.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _receipt_headers(service: Service, receipt_id: str | None) -> dict[str, str]:
    if service.receipts is None or receipt_id is None:
        return {}
    return {
        VERSION_HEADER: API_VERSION,
        KEYSET_HEADER: service.receipts.keyset_digest(),
        RECEIPT_HEADER: receipt_id,
    }


def _add_receipt_routes(app: FastAPI, service: Service) -> None:
    async def report(nonce: str, keyset_digest: str | None) -> Response:
        receipts = service.need_receipts()
        # No key is asked for: a client wants to know whom it talks to before it says anything. The rate of quotes is bounded.
        found = await asyncio.to_thread(receipts.attestation, nonce, keyset_digest)
        return JsonResponse(dump(found), headers={VERSION_HEADER: API_VERSION, "cache-control": "no-store"})

    @app.get("/v1/aci/attestation", response_model=None)
    async def attestation(nonce: Nonce, keyset_digest: OptionalText = None) -> Response:
        return await report(nonce, keyset_digest)

    @app.get("/v1/attestation/report", response_model=None)
    async def attestation_report(nonce: OptionalText = None) -> Response:
        return await report(secrets.token_hex(32) if nonce is None else nonce, None)

    @app.get("/v1/aci/receipts/{ident}", response_model=None)
    async def receipt(ident: str, who: Caller) -> Response:
        if not _ID.fullmatch(ident):
            raise ReceiptNotFound("no such receipt")
        found = await asyncio.to_thread(service.need_receipts().get, ident, who.id)
        return JsonResponse(dump(found), headers={VERSION_HEADER: API_VERSION, "cache-control": "no-store"})

    @app.get("/v1/signature/{chat_id}", response_model=None)
    async def signature(
        chat_id: str, who: Caller, signing_algo: Annotated[str, Query(max_length=50)] = "ed25519"
    ) -> Response:
        if not _ID.fullmatch(chat_id):
            raise ReceiptNotFound("no such receipt")
        found = await asyncio.to_thread(service.need_receipts().signature, chat_id, who.id, signing_algo)
        return JsonResponse(dump(found), headers={VERSION_HEADER: API_VERSION, "cache-control": "no-store"})


def _add_page(app: FastAPI) -> None:
    files = {name: (resources.files("veriattn.server") / "static" / name).read_bytes() for name in _PAGE}

    def serve(name: str) -> Response:
        return Response(files[name], media_type=f"{_PAGE[name]}; charset=utf-8", headers={"cache-control": "no-cache"})

    app.add_api_route("/", partial(serve, "index.html"), include_in_schema=False, response_model=None)
    for name in ("app.js", "style.css", "icon.svg"):
        app.add_api_route(f"/assets/{name}", partial(serve, name), include_in_schema=False, response_model=None)


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    def answer(error: ApiError) -> Response:
        if error.status >= 500:
            service.metrics.count(service.metrics.refused, error.code)
        return JsonResponse(dump(error.body()), status_code=error.status, headers=error.headers)

    async def api_error(_: Request, error: Exception) -> Response:
        return answer(error) if isinstance(error, ApiError) else answer(ApiError(500, "internal error", "internal"))

    async def veriattn_error(_: Request, error: Exception) -> Response:
        if isinstance(error, ReceiptNotFound):
            return answer(ApiError(404, error.message, error.code))
        if isinstance(error, AttestationBusy):
            return answer(ApiError(429, error.message, error.code, headers={"Retry-After": str(error.retry_after_s)}))
        if isinstance(error, UsageError):
            return answer(ApiError(400, error.message, "invalid_value"))
        return answer(from_veriattn(error)) if isinstance(error, VeriattnError) else await api_error(_, error)

    async def invalid(_: Request, error: Exception) -> Response:
        problems = error.errors() if isinstance(error, RequestValidationError) else []
        first = problems[0] if problems else {"loc": (), "msg": "the request is malformed"}
        names = [str(p) for p in first["loc"] if p not in ("body", "query", "path", "header")]
        message = str(first["msg"]).removeprefix("Value error, ")
        where = ".".join(names)[:200]
        return answer(ApiError(400, f"{where}: {message}" if where else message, "invalid_value", param=where or None))

    async def http(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return await api_error(_, error)
        codes = {404: "not_found", 405: "method_not_allowed", 400: "bad_request"}
        refused = ApiError(error.status_code, str(error.detail), codes.get(error.status_code, "http_error"))
        refused.headers.update(error.headers or {})
        return answer(refused)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(VeriattnError, veriattn_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
