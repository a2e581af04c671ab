"""Turns every failure into a JSON body in the format of OpenAI and vLLM."""

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from fairkv_jax.engine.prefix_registry import UnknownPrefix
from fairkv_jax.serve.body import NotServed
from fairkv_jax.serve.output_stream import (
    ClientQueueFull,
    EngineUnavailable,
    GenerationFailed,
    QueueFull,
    RequestRefused,
)

log = logging.getLogger(__name__)

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 600
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for requests whose client has disconnected; it appears only in the log."""

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "BadRequestError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    """The invalid field of the request; None if no single field is invalid."""
    code: int
    """The HTTP status."""


class ErrorBody(BaseModel):
    """The body of every response whose status is not 200."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is invalid."},
    "5XX": {
        "model": ErrorBody,
        "description": "The server is not ready, overloaded (with Retry-After) or has failed.",
    },
}
"""The error responses of the OpenAPI schema."""


class ClientGone(Exception):
    """The client disconnected before its response was complete."""


class ApiError(Exception):
    """An error response, with the name of the request's invalid field if there is one."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(
    status: int, message: str, param: str | None = None, *, retry_after_s: float = 0.0
) -> JSONResponse:
    """Returns an error; with status 429 or 503, it says when to try again."""
    headers = None
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        seconds = min(max(MIN_RETRY_AFTER_S, math.ceil(retry_after_s)), MAX_RETRY_AFTER_S)
        headers = {"Retry-After": str(seconds)}
    return JSONResponse(error_body(status, message, param), status, headers)


def status_of(error: Exception) -> int:
    """Returns the HTTP status for an exception."""
    match error:
        case ApiError():
            return error.status
        case HTTPException():
            return error.status_code
        case ClientQueueFull():
            return HTTPStatus.TOO_MANY_REQUESTS  # 503 would say that the server is overloaded
        case EngineUnavailable() | QueueFull():
            return HTTPStatus.SERVICE_UNAVAILABLE
        case RequestRefused():
            return HTTPStatus.BAD_REQUEST
        case UnknownPrefix():
            return HTTPStatus.NOT_FOUND
        case ClientGone() | ClientDisconnect():
            return CLIENT_CLOSED_REQUEST
        case _:
            return HTTPStatus.INTERNAL_SERVER_ERROR


def message_of(error: Exception) -> str:
    """Returns the message for the client.

    Unexpected exceptions are only logged, because their messages may contain other users' data.
    """
    if isinstance(error, HTTPException):
        return str(error.detail)
    if isinstance(error, GenerationFailed):
        return str(error)
    if status_of(error) == HTTPStatus.INTERNAL_SERVER_ERROR:
        return "internal server error: see the server's log"
    return str(error)


def add_error_handlers(app: FastAPI) -> None:
    async def expected(request: Request, error: Exception) -> JSONResponse:
        response = error_response(
            status_of(error),
            message_of(error),
            getattr(error, "param", None),
            retry_after_s=getattr(error, "retry_after_s", 0.0),
        )
        # Starlette adds headers such as `Allow`, in which it lists the methods of one route only.
        response.headers.update(getattr(error, "headers", None) or {})
        if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            response.headers["Allow"] = ", ".join(sorted(_methods(request)))
        return response

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = _describe(error.errors())
        return error_response(HTTPStatus.BAD_REQUEST, message, param)

    for kind in (
        ApiError,
        HTTPException,
        EngineUnavailable,
        GenerationFailed,
        QueueFull,
        RequestRefused,
        UnknownPrefix,
    ):
        app.add_exception_handler(kind, expected)
    for kind in (ClientGone, ClientDisconnect, Exception):
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(RequestValidationError, invalid)


def _methods(request: Request) -> set[str]:
    """Returns the methods that some route takes at the request's path."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in found for method in route.methods or ()}


def _describe(problems: Any) -> tuple[str, str | None]:
    """Returns a sentence about the first invalid field, and the field's name.

    The sentence does not contain the value, which may be a prompt.
    """
    causes = [problem.get("ctx", {}).get("error") for problem in problems]
    for cause in causes:  # A part of a union may be refused while the others do not fit.
        if isinstance(cause, NotServed):
            return str(cause), cause.field
    first, cause = problems[0], causes[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        return f"{cause or first['msg']}", None
    reasons = {p["msg"] for p in problems if [*p["loc"], ""][1] == first["loc"][1]}
    reasons = sorted(reason.removeprefix("Value error, ") for reason in reasons)
    return f"{path[0]}: {'; or '.join(reasons[:4])}", path[0]
