"""What a monitor reads at /metrics: vLLM's names, so that its dashboards work, and a few of ours.

All is counted from what passes between clients and engine; nothing here asks the engine thread.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

from fairkv_jax.engine.request import Request, RequestOutput

_LABEL = "model_name"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_LONG_SECONDS = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


@dataclass
class _Progress:
    """One request that runs or waits."""

    arrived: float
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of its own.

    The event loop tells it what happens; `clock` gives seconds.
    """

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._model_name = ""
        self._requests: dict[str, _Progress] = {}
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._define_gauges_and_counters()
        self._define_histograms()

    def _define_gauges_and_counters(self) -> None:
        self._running = self._make(Gauge, "vllm:num_requests_running", "that generate")
        self._waiting = self._make(Gauge, "vllm:num_requests_waiting", "that have no token yet")
        self._prompt_tokens = self._make(Counter, "vllm:prompt_tokens", "of started requests")
        self._generation_tokens = self._make(Counter, "vllm:generation_tokens", "generated")
        self._success = self._make(
            Counter, "vllm:request_success", "finished requests", labels=("finished_reason",)
        )
        self._utilization = self._make(
            Gauge, "fairkv:plan_utilization", "the plan's mean over fullest device, as planned"
        )
        self._copies = self._make(Gauge, "fairkv:plan_copies", "head copies over all layers")

    def _define_histograms(self) -> None:
        def seconds(name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return self._make(Histogram, f"vllm:{name}_seconds", text, buckets=buckets)

        def tokens(name: str, text: str) -> Histogram:
            return self._make(Histogram, f"vllm:{name}", text, buckets=_TOKENS)

        self._first_token = seconds("time_to_first_token", "from arrival to the first token")
        self._between = seconds("inter_token_latency", "between the tokens of a request")
        self._per_token = seconds("request_time_per_output_token", "mean over a request's tokens")
        self._whole = seconds("e2e_request_latency", "from arrival to the end", _LONG_SECONDS)
        self._decode = seconds("request_decode_time", "from the first token on", _LONG_SECONDS)
        self._prompt_length = tokens("request_prompt_tokens", "prompt tokens of a request")
        self._output_length = tokens("request_generation_tokens", "tokens a request generated")
        self._per_step = tokens("iteration_tokens_total", "prompt and new tokens of a step")
        self._kept = self._make(
            Histogram, "fairkv:kept_fraction", "kept part of a prompt", buckets=_TENTHS
        )

    def _make(self, kind, name: str, text: str, labels: Iterable[str] = (), **options):
        return kind(name, text, [_LABEL, *labels], registry=self.registry, **options)

    def describe(self, model_name: str, plan_utilization: float, plan_copies: int) -> None:
        """Say what is served; before that, nothing is counted."""
        self._model_name = model_name
        self._utilization.labels(model_name).set(plan_utilization)
        self._copies.labels(model_name).set(plan_copies)
        self._set_gauges()

    def submitted(self, requests: Iterable[Request]) -> None:
        now = self._clock()
        self._requests |= {request.request_id: _Progress(now) for request in requests}
        self._set_gauges()

    def stepped(self, outputs: Sequence[RequestOutput]) -> None:
        """Count what a step brought; outputs are cumulative."""
        now = self._clock()
        tokens = sum(self._advance(output, now) for output in outputs)
        self._per_step.labels(self._model_name).observe(tokens)
        self._set_gauges()

    def dropped(self, request_ids: Iterable[str]) -> None:
        """Requests that nobody waits for any more, or that failed."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._success.labels(self._model_name, "abort").inc()
        self._set_gauges()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _advance(self, output: RequestOutput, now: float) -> int:
        """Count one request's new tokens and return them, its prompt included when it starts."""
        progress = self._requests.get(output.request_id)
        if progress is None:
            return 0
        new = len(output.outputs[0].token_ids) - progress.num_tokens
        counted = new
        self._generation_tokens.labels(self._model_name).inc(new)
        if progress.first_token is None:
            counted += self._start(output, progress, now)
        elif new:
            for _ in range(new):
                self._between.labels(self._model_name).observe((now - progress.last_token) / new)
        progress.last_token = now
        progress.num_tokens += new
        if output.finished:
            self._finish(output, progress, now)
        return counted

    def _start(self, output: RequestOutput, progress: _Progress, now: float) -> int:
        length = len(output.prompt_token_ids)
        progress.first_token = now
        self._prompt_tokens.labels(self._model_name).inc(length)
        self._prompt_length.labels(self._model_name).observe(length)
        self._first_token.labels(self._model_name).observe(now - progress.arrived)
        if output.kv_lengths is not None:
            kept = float(output.kv_lengths.mean()) / length
            self._kept.labels(self._model_name).observe(kept)
        return length

    def _finish(self, output: RequestOutput, progress: _Progress, now: float) -> None:
        del self._requests[output.request_id]
        name, begun = self._model_name, progress.first_token or now
        self._success.labels(name, output.outputs[0].finish_reason).inc()
        self._output_length.labels(name).observe(progress.num_tokens)
        self._whole.labels(name).observe(now - progress.arrived)
        self._decode.labels(name).observe(now - begun)
        if progress.num_tokens > 1:
            self._per_token.labels(name).observe((now - begun) / (progress.num_tokens - 1))

    def _set_gauges(self) -> None:
        started = sum(request.first_token is not None for request in self._requests.values())
        self._running.labels(self._model_name).set(started)
        self._waiting.labels(self._model_name).set(len(self._requests) - started)
