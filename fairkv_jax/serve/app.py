"""The application: its routes, what stands before them, and the life of the engine."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from fairkv_jax import __version__
from fairkv_jax.serve import chat, completions, tokenization
from fairkv_jax.serve.async_engine import State
from fairkv_jax.serve.errors import add_error_handlers, error_response
from fairkv_jax.serve.middleware import ApiKeys, BodyLimit
from fairkv_jax.serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The ASGI application; it starts to load the engine when it is started itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()

    app = FastAPI(
        title="fairkv_jax",
        version=__version__,
        description="An OpenAI-compatible server with fair per-head KV-cache compression.",
        lifespan=lifespan,
    )
    app.state.service = service
    add_error_handlers(app)
    for router in (completions.router, chat.router, tokenization.router):
        app.include_router(router)
    _add_status_routes(app, service)
    if service.options.api_keys:
        app.add_middleware(ApiKeys, keys=service.options.api_keys)
    app.add_middleware(BodyLimit, max_bytes=service.options.max_request_bytes)
    return app


def _add_status_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/health")
    @app.get("/ready")
    async def health() -> JSONResponse:
        """200 while requests are taken; 503 before, and after a failure."""
        state = service.engine.state
        if state is State.READY:
            return JSONResponse({"status": state.value})
        return error_response(503, f"the engine is not ready, its state is: {state.value}")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model, under each of its names."""
        return {"object": "list", "data": [card(name) for name in service.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
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
