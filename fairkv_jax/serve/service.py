"""The objects that all routes share, and the route class that parses JSON bodies strictly."""

import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from uuid import uuid4

from fastapi import Request, Response
from fastapi.routing import APIRoute

from fairkv_jax.chat_template import NUM_WORKERS
from fairkv_jax.engine import request as engine_request
from fairkv_jax.engine.structured_output import GRAMMAR_WORKERS
from fairkv_jax.serve.access import Work
from fairkv_jax.serve.async_engine import AsyncEngine
from fairkv_jax.serve.client_work import ClientWork
from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.middleware import client_name, key_digest
from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.output_stream import OutputStream

MAX_SHOWN_CHARACTERS = 200
"""Characters of an unknown model's name that an error repeats."""


@dataclass(frozen=True)
class Service:
    """The engine, the options and the metrics of the running server."""

    engine: AsyncEngine
    options: ServerOptions
    metrics: Metrics
    grammars: ClientWork = field(default_factory=lambda: ClientWork("grammars", GRAMMAR_WORKERS))
    templates: ClientWork = field(default_factory=lambda: ClientWork("templates", NUM_WORKERS))

    @property
    def model_name(self) -> str:
        """The model name in responses."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.options.served_model_names or (self.engine.engine.model_name,)

    def check_model(self, name: str | None) -> None:
        """Checks the model name of a request; None selects the served model.

        Raises:
            ApiError: the server does not serve a model of that name (404).
            EngineUnavailable: the engine is not ready yet.
        """
        names = self.model_names
        if name is not None and name not in names:
            known, shown = ", ".join(names), name[:MAX_SHOWN_CHARACTERS]
            raise ApiError(
                404, f"The model `{shown}` does not exist: this server serves {known}", "model"
            )

    def submit(
        self, http: Request, requests: Sequence[engine_request.Request], choices: int
    ) -> OutputStream:
        """Submits requests to the engine and records them for the access log.

        There are `choices` adjacent requests per prompt.

        Raises:
            EngineUnavailable, RequestRefused, QueueFull: see `AsyncEngine.submit`.
        """
        outputs = self.engine.submit(requests, client_of(http))
        http.state.work = Work(outputs, choices)
        return outputs


def service_of(request: Request) -> Service:
    return request.app.state.service


def response_id(request: Request, kind: str, wanted: str | None) -> str:
    """Returns the `id` of a response: its kind, and the id of the request as it is logged.

    That is the header's X-Request-Id, else `wanted`, else a new one.
    """
    request.state.request_id = request.state.request_id or wanted or uuid4().hex
    return f"{kind}-{request.state.request_id}"


def owner_of(request: Request) -> str:
    """Returns whose prefixes a request may use: those of its API key, if there are keys."""
    digest = key_digest(request.headers) if service_of(request).options.api_keys else None
    return "" if digest is None else digest.hex()


def client_of(request: Request) -> str:
    """Returns who sends a request: its API key if there are keys, and its address otherwise."""
    return client_name(request.scope, has_keys=bool(service_of(request).options.api_keys))


class _StrictRequest(Request):
    """A request that rejects NaN and Infinity, which Python's JSON parser accepts."""

    async def json(self) -> Any:
        if not hasattr(self, "_parsed"):
            self._parsed = _parse(await self.body())
        return self._parsed


def _parse(body: bytes) -> Any:
    try:
        text = body.decode("utf-8-sig")
        parsed = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:
            _refuse_surrogates(parsed, [])
        return parsed
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def _refuse_surrogates(value: Any, path: list[str]) -> None:
    """Checks that every text, and every key of an object, is valid Unicode.

    JSON can escape half of a surrogate pair, which neither UTF-8 nor the tokenizer can represent.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            where = ".".join(path) or "the body"
            raise ApiError(
                400,
                f"{where} is not valid Unicode: it has an unpaired surrogate "
                f"({value[error.start]!r}) at position {error.start}: send the whole character",
                path[0] if path else None,
            ) from None
    elif isinstance(value, list):
        for each in value:
            _refuse_surrogates(each, path)
    elif isinstance(value, dict):
        for key, each in value.items():
            _refuse_surrogates(key, path)
            _refuse_surrogates(each, [*path, key])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class StrictRoute(APIRoute):
    """A route that requires uncompressed JSON as application/json and parses it strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            content_type = request.headers.get("content-type", "unknown")
            if content_type.split(";")[0].strip().lower() != "application/json":
                raise ApiError(
                    415,
                    f"the content type is {content_type[:64]}: send 'Content-Type: "
                    "application/json'",
                )
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if encoding != "identity":
                raise ApiError(
                    415,
                    f"the body is compressed ({encoding[:64]}), which is not supported: send it "
                    "without Content-Encoding",
                )
            request = _StrictRequest(request.scope, request.receive)
            await request.json()  # FastAPI would replace an error in parsing with a generic one.
            return await handle(request)

        return strict
