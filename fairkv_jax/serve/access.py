"""The access log: one JSON object per request, with its token counts, status and latencies.

The log contains prompts only with `--enable-log-requests`. It is written to standard output; all
other logs are written to standard error.
"""

import json
import logging
import re
import sys
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.serve.output_stream import OutputStream

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
QUIET_PATHS = ("/health", "/live", "/load", "/metrics", "/ping", "/ready", "/stats")
"""Paths that monitors poll. Successful requests to them are logged at level `debug` only."""

WELL_FORMED_ID = r"[A-Za-z0-9_.:/+=-]{1,128}"
"""Ids of clients that are used, in this header or in a body's request_id."""


@dataclass(frozen=True)
class Work:
    """The engine requests of one HTTP request; the `choices` of each prompt are adjacent."""

    outputs: OutputStream
    choices: int

    def record(self) -> dict[str, Any]:
        """Returns the token counts, as in `usage`, and the latencies of the first choice.

        Values that are not known yet are left out.
        """
        requests, latest = self.outputs.requests, self.outputs.latest
        record = {
            "prompt_tokens": sum(len(r.prompt_token_ids) for r in requests[:: self.choices]),
            "completion_tokens": sum(len(o.outputs[0].token_ids) for o in latest.values()),
            "finish_reasons": [_reason(latest.get(index)) for index in range(len(requests))],
        }
        first = latest.get(0)
        if first is not None and first.kv_lengths is not None:
            kept = float(first.kv_lengths.mean()) / len(first.prompt_token_ids)
            record["kept_fraction"] = round(kept, 4)
        times = first.metrics if first is not None else None
        if times is not None and times.first_scheduled_time is not None:
            waited = times.first_scheduled_time - times.arrival_time
            record["queue_seconds"] = round(waited, 6)
        if times is not None and times.prefill_finished_time is not None:
            until_first = times.prefill_finished_time - times.arrival_time
            record["first_token_seconds"] = round(until_first, 6)
        return record

    def prompts(self) -> list[str | list[int]]:
        requests = self.outputs.requests[:: self.choices]
        return [request.prompt or request.prompt_token_ids for request in requests]


def _reason(output: RequestOutput | None) -> str:
    return (output and output.outputs[0].finish_reason) or "abort"


class AccessLog:
    """Middleware that gives every request an id and logs the request when it has ended.

    The id is the header's, if it is well formed; else the one that a handler takes from the body
    and stores in the request's state under "request_id"; else a new one. Handlers store their
    `Work` under "work".
    """

    def __init__(self, app: ASGIApp, log_prompts: bool):
        self.app = app
        self.log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if re.fullmatch(WELL_FORMED_ID, given) else None
        began = time.monotonic()
        status = 500  # Logged if the handler fails before it starts a response.

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                state["request_id"] = state["request_id"] or uuid4().hex
                MutableHeaders(scope=message)[REQUEST_ID] = state["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._log(scope, state["request_id"], status, time.monotonic() - began)

    def _log(
        self, scope: MutableMapping[str, Any], request_id: str | None, status: int, seconds: float
    ) -> None:
        client = scope.get("client")
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 6),
        }
        work: Work | None = scope.get("state", {}).get("work")
        if work is not None:
            record |= work.record()
            if self.log_prompts:
                record["prompts"] = work.prompts()
        is_quiet = status == 200 and scope["path"] in QUIET_PATHS
        log.log(logging.DEBUG if is_quiet else logging.INFO, "%s", json.dumps(record))


def log_to_stdout(level: str) -> None:
    """Writes the access log to standard output, one JSON object per line without a prefix."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
