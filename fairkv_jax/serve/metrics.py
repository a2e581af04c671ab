"""The Prometheus metrics at /metrics, with vLLM's names where vLLM has the metric.

All values are computed from the outputs and statistics that the engine thread posts after a step.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.engine.stats import EngineStats
from fairkv_jax.plan import Plan

_LABELS = ("model_name", "engine")
_ENGINE = "0"
"""vLLM labels every engine of a server with its index; this server has only one."""
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_LONG_SECONDS = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


@dataclass
class _Progress:
    """The progress of one running or waiting request."""

    arrived: float
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0
    is_looked_up: bool = False
    """Whether its prompt has been counted as looked up in the prefix cache."""


@dataclass
class Totals:
    """Sums since the start, from which the live page computes rates and means."""

    finished: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    first_token_seconds: float = 0.0
    """Times to first token, summed over all requests."""
    intervals: int = 0
    """Number of intervals between consecutive tokens of a request."""
    interval_seconds: float = 0.0
    kept_tokens: np.ndarray | float = 0.0
    """Kept prompt tokens per layer and KV head, summed over all prompts, [L, K]."""


class Metrics:
    """The counters, gauges and histograms of one server, in a separate registry.

    All methods are called in the event loop. `clock` returns seconds and must be the clock that the
    engine uses for `RequestMetrics`.
    """

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._labels = {"model_name": "", "engine": _ENGINE}
        self._requests: dict[str, _Progress] = {}
        self.totals = Totals()
        self.stats: EngineStats | None = None
        """The engine's statistics after its last step; None until the engine is ready."""
        self._compiled_at_ready = 0
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._define_gauges()
        self._define_counters()
        self._define_histograms()

    def _define_gauges(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, [*_LABELS, *labels], registry=self.registry)

        self._running = gauge("vllm:num_requests_running", "Requests running.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.")
        self._usage = gauge(
            "vllm:kv_cache_usage_perc",
            "Fraction of KV pages in use on the fullest device; 1 means full.",
        )
        self._kv_tokens = gauge(
            "fairkv:kv_tokens", "Cached tokens per device, summed over layers and heads.", "device"
        )
        self._imbalance = gauge(
            "fairkv:kv_load_max_over_mean",
            "Cached tokens on the fullest device, divided by the mean over devices.",
        )
        self._utilization = gauge(
            "fairkv:plan_utilization", "Utilization of the devices in attention that is planned."
        )
        self._prefixes = gauge("fairkv:prefixes", "Prefixes that are cached.")
        self._prefix_bytes = gauge(
            "fairkv:prefix_bytes", "Bytes of the KV pages of cached prefixes, over all devices."
        )
        self._prefix_sharing = gauge(
            "fairkv:prefix_sharing",
            "Mean number of running requests that begin with the same cached prefix.",
        )
        self._replicas = gauge(
            "fairkv:plan_copies", "Extra head replicas of the plan, summed over layers."
        )

    def _define_counters(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, [*_LABELS, *labels], registry=self.registry)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prefilled prompt tokens.")
        self._prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self._prefix_hits = counter(
            "vllm:prefix_cache_hits", "Prompt tokens that were found in the prefix cache."
        )
        self._generation_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self._success = counter("vllm:request_success", "Finished requests.", "finished_reason")
        self._preemptions = counter(
            "vllm:num_preemptions", "Preemptions of requests because the KV cache was full."
        )
        self._compilations = counter(
            "fairkv:compilations_after_ready",
            "Programs compiled after the server was ready; 0 is expected.",
        )

    def _define_histograms(self) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, _LABELS, registry=self.registry, buckets=buckets)

        def seconds(name: str, text: str, buckets: Sequence[float] = _LONG_SECONDS) -> Histogram:
            return histogram(f"vllm:{name}_seconds", text, buckets)

        self._first_token = seconds(
            "time_to_first_token", "Time from arrival to the first token.", _SECONDS
        )
        self._between = seconds(
            "inter_token_latency", "Time between consecutive tokens of a request.", _SECONDS
        )
        self._per_token = seconds(
            "request_time_per_output_token", "Mean time per output token of a request.", _SECONDS
        )
        self._whole = seconds("e2e_request_latency", "Time from arrival to the end of a request.")
        self._queue = seconds("request_queue_time", "Time from arrival to the start of prefill.")
        self._prefill = seconds(
            "request_prefill_time", "Time from the start of prefill to the first token."
        )
        self._decode = seconds("request_decode_time", "Time from the first token to the last.")
        self._inference = seconds("request_inference_time", "Time in prefill and decode.")
        self._prompt_length = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self._output_length = histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", _TOKENS
        )
        self._per_step = histogram(
            "vllm:iteration_tokens_total", "Prefilled and generated tokens per step.", _TOKENS
        )
        self._kept = histogram(
            "fairkv:kept_fraction", "Fraction of a prompt's tokens kept per head.", _TENTHS
        )

    def describe(self, model_name: str, plan: Plan) -> None:
        """Sets the model's name and the plan's gauges; must precede all other calls."""
        self._labels["model_name"] = model_name
        self._utilization.labels(**self._labels).set(plan.utilization)
        self._replicas.labels(**self._labels).set(plan.num_extra_replicas)

    @property
    def num_running(self) -> int:
        return min(self.stats.num_running if self.stats else 0, len(self._requests))

    @property
    def num_waiting(self) -> int:
        """Waiting requests, including those that have not reached the engine thread yet."""
        return len(self._requests) - self.num_running

    @property
    def compilations_after_ready(self) -> int:
        return self.stats.compilations - self._compiled_at_ready if self.stats else 0

    def submitted(self, requests: Iterable[Request]) -> None:
        now = self._clock()
        self._requests |= {request.request_id: _Progress(now) for request in requests}
        self._set_queue_gauges()

    def stepped(self, outputs: Sequence[RequestOutput], stats: EngineStats) -> None:
        """Records the outputs of a step, which are cumulative, and the engine's statistics."""
        now = self._clock()
        if tokens := sum(self._advance(output, now) for output in outputs):
            self._per_step.labels(**self._labels).observe(tokens)
        self._take(stats)

    def dropped(self, request_ids: Iterable[str]) -> None:
        """Records requests that were aborted or failed."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._success.labels(**self._labels, finished_reason="abort").inc()
        self._set_queue_gauges()

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Returns all metrics, and the media type of their format.

        That is Prometheus' text format, or OpenMetrics if the header Accept asks for it.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def _take(self, stats: EngineStats) -> None:
        if self.stats is None:
            self._compiled_at_ready = stats.compilations
        before, self.stats = self.stats or stats, stats
        labels = self._labels
        self._preemptions.labels(**labels).inc(stats.num_preemptions - before.num_preemptions)
        self._compilations.labels(**labels).inc(stats.compilations - before.compilations)
        self._usage.labels(**labels).set(max(stats.used_pages) / stats.pages_per_device)
        for device, tokens in enumerate(stats.kv_tokens):
            self._kv_tokens.labels(**labels, device=device).set(tokens)
        self._imbalance.labels(**labels).set(max_over_mean(stats.kv_tokens))
        if stats.prefixes is not None:
            self._prefixes.labels(**labels).set(stats.prefixes.count)
            self._prefix_bytes.labels(**labels).set(stats.prefixes.bytes)
            self._prefix_sharing.labels(**labels).set(stats.prefixes.sharing)
        self._set_queue_gauges()

    def _advance(self, output: RequestOutput, now: float) -> int:
        """Records a request's new tokens and returns their number.

        The number includes the prompt's tokens when the request generates its first token.
        """
        progress = self._requests.get(output.request_id)
        if progress is None:
            return 0
        new = len(output.outputs[0].token_ids) - progress.num_tokens
        counted = new
        self._look_up(output, progress)
        self._generation_tokens.labels(**self._labels).inc(new)
        self.totals.generation_tokens += new
        if progress.first_token is None:
            if new:
                counted += self._start(output, progress, now)
        elif new:
            self._observe_intervals(new, now - progress.last_token)
        if new:
            progress.last_token = now
            progress.num_tokens += new
        if output.finished:
            self._finish(output, progress, now)
        return counted

    def _look_up(self, output: RequestOutput, progress: _Progress) -> None:
        """Counts the tokens of a prompt that was looked up in the prefix cache, once."""
        caches = self.stats is not None and self.stats.prefixes is not None
        if caches and output.num_cached_tokens is not None and not progress.is_looked_up:
            progress.is_looked_up = True
            self._prefix_queries.labels(**self._labels).inc(len(output.prompt_token_ids))
            self._prefix_hits.labels(**self._labels).inc(output.num_cached_tokens)

    def _start(self, output: RequestOutput, progress: _Progress, now: float) -> int:
        length = len(output.prompt_token_ids)
        progress.first_token = now
        self._prompt_tokens.labels(**self._labels).inc(length)
        self._first_token.labels(**self._labels).observe(now - progress.arrived)
        self.totals.prompts += 1
        self.totals.prompt_tokens += length
        self.totals.first_token_seconds += now - progress.arrived
        if output.kv_lengths is not None:
            self._kept.labels(**self._labels).observe(float(output.kv_lengths.mean()) / length)
            self.totals.kept_tokens = self.totals.kept_tokens + output.kv_lengths
        return length

    def _observe_intervals(self, new: int, seconds: float) -> None:
        """Records intervals; tokens that arrive together share the time since the last token."""
        for _ in range(new):
            self._between.labels(**self._labels).observe(seconds / new)
        self.totals.intervals += new
        self.totals.interval_seconds += seconds

    def _finish(self, output: RequestOutput, progress: _Progress, now: float) -> None:
        del self._requests[output.request_id]
        labels, begun = self._labels, progress.first_token or now
        self.totals.finished += 1
        self._success.labels(
            **labels, finished_reason=output.outputs[0].finish_reason or "abort"
        ).inc()
        self._prompt_length.labels(**labels).observe(len(output.prompt_token_ids))
        self._output_length.labels(**labels).observe(progress.num_tokens)
        self._whole.labels(**labels).observe(now - progress.arrived)
        if progress.num_tokens > 1:
            self._per_token.labels(**labels).observe((now - begun) / (progress.num_tokens - 1))
        self._observe_phases(output, progress)

    def _observe_phases(self, output: RequestOutput, progress: _Progress) -> None:
        """Records the engine's times; time in the queue counts from the HTTP request's arrival."""
        times = output.metrics
        if times is None or times.first_scheduled_time is None:
            return
        first = times.prefill_finished_time or times.first_scheduled_time
        last = times.last_token_time or first
        labels = self._labels
        self._queue.labels(**labels).observe(max(times.first_scheduled_time - progress.arrived, 0))
        self._prefill.labels(**labels).observe(first - times.first_scheduled_time)
        self._decode.labels(**labels).observe(last - first)
        self._inference.labels(**labels).observe(last - times.first_scheduled_time)

    def _set_queue_gauges(self) -> None:
        self._running.labels(**self._labels).set(self.num_running)
        self._waiting.labels(**self._labels).set(self.num_waiting)


def max_over_mean(loads: Sequence[int]) -> float:
    """Returns the largest load divided by the mean load, or 1 if all loads are 0."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
