"""The live page at / with its data, and the page at /docs, which shows the OpenAPI description.

The live page polls /stats every second and /plan less often.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from fairkv_jax import __version__
from fairkv_jax.serve.async_engine import State
from fairkv_jax.serve.history import History
from fairkv_jax.serve.service import Service
from fairkv_jax.serve.startup import compression

LISTED_PREFIXES = 10
"""Most prefixes that the page lists."""
FOLDER = Path(__file__).parent
FILES = {
    "page.css": "text/css",
    "docs.css": "text/css",
    "docs.js": "text/javascript",
    "charts.js": "text/javascript",
    "page.js": "text/javascript",
    "favicon.svg": "image/svg+xml",
}
HEADERS = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "no-cache"}
"""Headers that keep the page from running inline scripts and from loading external resources."""


def page_routes(service: Service, history: History) -> APIRouter:
    """Returns the routes of the page, of its static files and of its two JSON endpoints."""
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @router.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(FOLDER / "docs.html", headers=HEADERS)

    for name, media_type in FILES.items():
        _add_file(router, name, media_type)

    @router.get("/stats")
    async def stats(since: int = 0) -> dict[str, Any]:
        """Returns the server's state and the samples whose number is larger than `since`."""
        metrics = service.metrics
        return {
            "state": service.engine.state.value,
            "version": __version__,
            "prompts": metrics.totals.prompts,
            "finished": metrics.totals.finished,
            "pages_per_device": metrics.stats.pages_per_device if metrics.stats else None,
            "preemptions": metrics.stats.num_preemptions if metrics.stats else None,
            "compilations_after_ready": metrics.compilations_after_ready,
            "prefixes": _prefixes(service),
            "samples": history.since(since),
        }

    @router.get("/plan")
    async def plan() -> dict[str, Any]:
        """Returns the model, the head plan and the mean number of tokens kept per head."""
        engine, totals = service.engine.engine, service.metrics.totals
        plan, config = engine.plan, engine.engine_config
        kept = totals.kept_tokens
        return {
            "model": service.model_name,
            "compression": compression(engine),
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": config.max_model_len,
            "kv_capacity_tokens": engine.kv_capacity_tokens,
            "strategy": plan.strategy,
            "utilization": plan.utilization,
            "num_extra_replicas": plan.num_extra_replicas,
            "num_devices": plan.num_devices,
            "num_heads": plan.num_heads,
            "layers": [
                [
                    {"head": replica.head, "device": replica.device, "share": replica.share}
                    for replica in layer
                ]
                for layer in plan.layers
            ],
            "kept_tokens": (
                (kept / totals.prompts).round(2).tolist() if isinstance(kept, np.ndarray) else None
            ),
            "mean_prompt_tokens": totals.prompt_tokens / totals.prompts if totals.prompts else None,
        }

    return router


def _prefixes(service: Service) -> dict[str, Any] | None:
    """Returns the totals and the most recently used prefixes; None if none are cached at all.

    Where there are API keys, only the totals: prefixes belong to keys.
    """
    stats = service.metrics.stats
    if stats is None or stats.prefixes is None:
        return None
    keeps_list = not service.options.api_keys and service.engine.state is State.READY
    engine = service.engine.engine if keeps_list else None
    recent = engine.retained_prefixes(LISTED_PREFIXES) if engine is not None else []
    return {**asdict(stats.prefixes), "recent": [asdict(prefix) for prefix in recent]}


def _add_file(router: APIRouter, name: str, media_type: str) -> None:
    @router.get(f"/{name}", include_in_schema=False)
    async def file() -> Response:
        return FileResponse(FOLDER / name, media_type=media_type, headers=HEADERS)
