"""Every error as OpenAI's error object with the status that its clients know.

====== ============================ ==========================================================
status type                         when
====== ============================ ==========================================================
400    invalid_request_error        the body is no JSON, a field is unknown or out of range, the
                                    prompt is too long (code `context_length_exceeded`)
401    authentication_error         no key, or a wrong one (code `invalid_api_key`)
404    not_found_error              no such path or model (code `model_not_found`)
405    invalid_request_error        no such method here
408    timeout_error                the request took longer than `--request-timeout`
413    invalid_request_error        the body is larger than `--max-body-bytes`
429    rate_limit_error             the queue is full; `Retry-After` says when to come back
500    server_error                 a step failed, or the engine's process ended meanwhile
503    service_unavailable_error    loading or draining; `Retry-After`
====== ============================ ==========================================================

In a stream that has begun, the error comes as a last event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pagelab.errors import (
    EngineUnavailableError,
    OverloadedError,
    PageLabError,
    RequestError,
    RequestTooLongError,
)

_TRIED = ("str", "int", "float", "bool")
_RETRY_OVERLOADED_S, _RETRY_UNAVAILABLE_S = 1, 5
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """An answer that is an error. (An HTTPException: FastAPI lets it through while it reads.)"""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.detail,
                "type": _TYPES.get(self.status_code, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def of_exception(error: Exception) -> ApiError:
    """What a client is told about an exception of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, OverloadedError):
        return ApiError(
            429,
            str(error),
            code="queue_full",
            headers={"Retry-After": str(_RETRY_OVERLOADED_S)},
        )
    if isinstance(error, EngineUnavailableError):
        return ApiError(503, str(error), headers={"Retry-After": str(_RETRY_UNAVAILABLE_S)})
    if isinstance(error, TimeoutError):
        return ApiError(408, "the request took longer than this server allows", code="timeout")
    if isinstance(error, PageLabError):
        return ApiError(500, str(error))
    return ApiError(500, "internal error")


def of_validation(problems: Sequence[Any]) -> ApiError:
    """The first problem that pydantic found, in OpenAI's words."""
    problem = problems[0]
    # after a field, pydantic names the type of a union that it tried: no word for a client
    place = takewhile(lambda part: part.isidentifier() or part.isdigit(), map(str, problem["loc"]))
    param = ".".join(part for part in [*place][1:] if part not in _TRIED) or None
    if problem["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"Unrecognized request argument supplied: {param}",
            param=param,
            code="unknown_parameter",
        )
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {problem['ctx']['error']}")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def install(app: FastAPI) -> None:
    """Have all errors answered in this form."""

    async def ours(_: Request, error: Exception) -> Response:
        return of_exception(error).response()

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors()).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(PageLabError, ours)
    app.add_exception_handler(TimeoutError, ours)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, ours)
