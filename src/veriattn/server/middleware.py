"""The outermost layer: request ids, body limit, access log, headers."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veriattn.server.config import is_loopback
from veriattn.server.errors import ApiError
from veriattn.server.responses import dump

log = logging.getLogger("veriattn.server.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Outermost:
    """Pure ASGI, so that streams pass through untouched. Logs who, what and how long; never prompts, answers or keys.

    local_only: nobody is asked for a key because nobody else reaches this machine. But a browser on it does what foreign
    pages tell it, so requests from their origins (unless in `origins`), or under a foreign name that was made to point here,
    are refused.
    """

    def __init__(self, app: ASGIApp, body_bytes: int, local_only: bool = False, origins: tuple[str, ...] = ()) -> None:
        self._app, self._body_bytes, self._local_only, self._origins = app, body_bytes, local_only, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = time.monotonic(), 0
        left, refused = self._body_bytes, False

        async def bounded_receive() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise _too_large(self._body_bytes)
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status, refused
            if left < 0 and status == 0:
                # The framework takes our refusal for a body that does not parse, and answers so.
                refused = True
                await _answer(_too_large(self._body_bytes), marked_send_once)
                return
            if refused:
                return
            await marked_send_once(message)

        async def marked_send_once(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if self._local_only:
                self._check_local(scope)
            if _declared_length(scope) > self._body_bytes:
                raise _too_large(self._body_bytes)
            await self._app(scope, bounded_receive, marked_send)
        except ApiError as e:
            if status:
                raise
            await _answer(e, marked_send_once)
        finally:
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "key": state.get("key_id"),
                    "method": scope["method"],
                    "path": _route(scope),
                    "status": status,
                    "duration_ms": round(1000 * (time.monotonic() - started), 1),
                    "usage": state.get("usage"),
                },
            )

    def _check_local(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            text = value.decode("latin-1")
            foreign = name == b"host" and not _names_this_machine("//" + text)
            foreign |= name == b"origin" and text not in self._origins and not _names_this_machine(text)
            if foreign:
                raise ApiError(
                    403, "without API keys this server answers to this machine's own names and pages only", "not_local"
                )


def _names_this_machine(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _route(scope: Scope) -> str:
    # The route's pattern, not the path: a path may carry what a client should not have put there.
    route = scope.get("route")
    return str(getattr(route, "path", None) or "unmatched")


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return str(text)
    return "req_" + uuid.uuid4().hex


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the request's body is larger than {limit} bytes", "request_too_large", headers={"Connection": "close"}
    )


async def _answer(error: ApiError, send: Send) -> None:
    body = dump(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
