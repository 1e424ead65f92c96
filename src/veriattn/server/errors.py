"""Errors in the shape that OpenAI clients know."""

from __future__ import annotations

from typing import Any

from veriattn.errors import (
    AttestationError,
    InternalError,
    ModelError,
    ProverFault,
    UsageError,
    VeriattnError,
    VerificationError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than 200: status, message, stable code, the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients parse."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def public_message(error: VeriattnError) -> str:
    """What anyone may read: no word of it is the prover's, which could address users through it."""
    return "it reports an error of its own, which is in the log" if type(error) is ProverFault else error.message


def from_veriattn(error: VeriattnError) -> ApiError:
    """What a client is told of one of our errors.

    A rejection names layer and operation; hints may quote the prover's own output and stay in the log.
    """
    if isinstance(error, UsageError):
        return ApiError(400, error.message, "invalid_value")
    if isinstance(error, VerificationError):
        return ApiError(502, f"verification failed, nothing unchecked was sent: {error.message}", error.code)
    if isinstance(error, ProverFault):
        return ApiError(503, f"the prover failed: {public_message(error)}", error.code, headers={"Retry-After": "2"})
    if isinstance(error, AttestationError):
        return ApiError(503, error.message, error.code, headers={"Retry-After": "5"})
    if isinstance(error, ModelError):
        return ApiError(500, error.message, error.code)
    code = error.code if isinstance(error, InternalError) else "internal"
    return ApiError(500, "internal error; the log has its details under this request's id", code)
