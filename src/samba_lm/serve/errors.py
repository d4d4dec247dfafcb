"""What goes wrong, as OpenAI's clients expect to be told: a status and ``{"error": {...}}``."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from samba_lm.engine.engine import QueueFullError, StoppedError
from samba_lm.errors import UserError, one_line
from samba_lm.generation.sampling import DamagedModelError

RETRY_SECONDS = 1
"""What a client that comes too early is told to wait."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that gets no answer but this one.

    Args:
        status: HTTP's.
        message: one line for people: the value, the limit and the fix.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message), param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # ASCII, so that half a surrogate pair in a quoted value can be sent too.
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; a defect of ours keeps its details for the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return busy(str(error))
    if isinstance(error, StoppedError):
        return ApiError(503, "The server is stopping or has failed: try another one.", code="unavailable")
    if isinstance(error, DamagedModelError):
        return ApiError(500, str(error), code="damaged_model")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "Something went wrong inside the server; its log says what.", code="internal_error")


def busy(message: str, seconds: int = RETRY_SECONDS) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def unavailable() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down: send the request again, to another one or later.",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
    )
