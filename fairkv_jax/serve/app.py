"""The ASGI application: routes, middleware, and start and stop of the engine."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from fairkv_jax import __version__
from fairkv_jax.serve import chat, completions, prefixes, tokenization
from fairkv_jax.serve.access import REQUEST_ID, AccessLog
from fairkv_jax.serve.async_engine import State
from fairkv_jax.serve.errors import DOCUMENTED, ApiError, add_error_handlers, error_response
from fairkv_jax.serve.history import History
from fairkv_jax.serve.middleware import ApiKeys, Room, SizeLimits
from fairkv_jax.serve.page import page_routes
from fairkv_jax.serve.service import Service
from fairkv_jax.serve.unsupported import PATHS


def create_app(service: Service) -> FastAPI:
    """Creates the application, which starts to load the engine when the application starts."""
    history = History(service.metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        recording = asyncio.create_task(history.record())
        yield
        recording.cancel()
        service.engine.stop()

    app = FastAPI(
        title="fairkv_jax",
        version=__version__,
        description="An OpenAI-compatible server with fair per-head KV-cache compression.",
        lifespan=lifespan,
        responses=DOCUMENTED,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere.
        redoc_url=None,
    )
    app.state.service = service
    add_error_handlers(app)
    for router in (
        completions.router,
        chat.router,
        tokenization.router,
        prefixes.creation,
        prefixes.router,
    ):
        app.include_router(router)
    app.include_router(page_routes(service, history))
    _add_status_routes(app, service)
    _refuse_other_apis(app)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Adds the middleware; the one that is added last handles a request first."""
    options = service.options
    app.add_middleware(Room, engine=service.engine, has_keys=bool(options.api_keys))
    if options.api_keys:
        app.add_middleware(ApiKeys, keys=options.api_keys, open_metrics=options.open_metrics)
    app.add_middleware(SizeLimits, max_bytes=options.max_request_bytes)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods,
            allow_headers=options.allowed_headers,
            allow_credentials=options.allow_credentials,
            expose_headers=[REQUEST_ID],
        )
    app.add_middleware(AccessLog, log_prompts=options.enable_log_requests)


def _add_status_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def status(is_well: bool) -> JSONResponse:
        state = service.engine.state.value
        if is_well:
            return JSONResponse({"status": state})
        return error_response(503, f"the engine is not ready: its state is {state!r}")

    @app.head("/live", include_in_schema=False)
    @app.get("/live")
    async def live() -> JSONResponse:
        """Liveness: returns 200 as long as the process answers, and says what state it is in."""
        return status(True)

    @app.head("/health", include_in_schema=False)
    @app.head("/ping", include_in_schema=False)
    @app.post("/ping")  # vLLM answers both methods.
    @app.get("/ping")
    @app.get("/health")
    async def health() -> JSONResponse:
        """For routers: returns 503 unless requests are accepted and make progress."""
        stalled = service.engine.seconds_stalled
        if stalled > service.options.stall_timeout:
            return error_response(
                503,
                f"no step of the engine has ended for {stalled:.0f} seconds although requests are "
                "running: see the server's log, or raise --stall-timeout",
            )
        return await ready()

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Readiness: returns 200 while the server accepts requests, and 503 otherwise."""
        return status(service.engine.state is State.READY)

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Returns the number of HTTP requests that run or wait."""
        return {"server_load": service.engine.num_http_requests}

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format, or in OpenMetrics if Accept asks for it."""
        content, media_type = service.metrics.exposition(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": media_type})

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Returns the version of the server."""
        return {"version": __version__}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Returns the tokenizer's class, its special tokens and its chat template."""
        engine = service.engine.engine
        return {**engine.tokenizer.info(), "model_max_length": engine.engine_config.max_model_len}

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Lists the served model under each of its names."""
        return {"object": "list", "data": [card(name) for name in service.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Shows the served model under one of its names."""
        service.check_model(name)
        return card(name)

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "fairkv_jax",
            "max_model_len": service.engine.engine.engine_config.max_model_len,
        }


def _refuse_other_apis(app: FastAPI) -> None:
    """Answers 400 at the paths of OpenAI's and vLLM's other APIs.

    Proxies such as LiteLLM's take a deployment out of use after a 404.
    """

    def refuse(path: str, what: str) -> None:
        async def refused() -> None:
            raise ApiError(
                400,
                f"{path} is not supported by this server ({what}): use /v1/chat/completions or "
                "/v1/completions",
            )

        for route in (path, path + "/{rest:path}"):
            app.add_api_route(route, refused, methods=_METHODS, include_in_schema=False)

    for path, what in PATHS.items():
        refuse(path, what)


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
