"""The Prometheus metrics at /metrics, with vLLM's names where vLLM has the metric.

All values are computed from the outputs and statistics that the engine thread posts after a step.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.engine.stats import EngineStats
from fairkv_jax.serve.engine_protocol import Engine
from fairkv_jax.serve.instruments import Instruments


@dataclass
class _Choices:
    """The choices of one request, each of which the engine takes for a request."""

    num: int
    unfinished: int
    longest: int = 0


@dataclass
class _Progress:
    """The progress of one running or waiting choice."""

    arrived: float
    max_tokens: int | None
    choices: _Choices
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
        self._requests: dict[str, _Progress] = {}
        self.totals = Totals()
        self.stats: EngineStats | None = None
        """The engine's statistics after its last step; None until the engine is ready."""
        self._compiled_at_ready = 0
        self._all = Instruments()

    def describe(self, model_name: str, engine: Engine) -> None:
        """Describes the model, the plan and the cache; must precede all other calls."""
        self._all.describe(model_name)
        self._all.utilization().set(engine.plan.utilization)
        self._all.replicas().set(engine.plan.num_extra_replicas)
        options = engine.engine_config
        info = {
            "block_size": options.page_size,
            "num_gpu_blocks": engine.kv_capacity_tokens // options.page_size,
            "cache_dtype": options.kv_cache_dtype,
            "enable_prefix_caching": options.enable_prefix_caching,
            "kv_cache_memory_bytes": options.kv_cache_bytes,
        }
        self._all.cache_config(**info).set(1)

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
        groups: dict[str, list[Request]] = {}
        for request in requests:
            groups.setdefault(request.same_prompt or request.request_id, []).append(request)
        for group in groups.values():
            choices = _Choices(len(group), len(group))
            for request in group:
                max_tokens = request.sampling_params.max_tokens
                self._requests[request.request_id] = _Progress(now, max_tokens, choices)
        self._set_queue_gauges()

    def stepped(self, outputs: Sequence[RequestOutput], stats: EngineStats) -> None:
        """Records the outputs of a step, which are cumulative, and the engine's statistics."""
        now = self._clock()
        if tokens := sum(self._advance(output, now) for output in outputs):
            self._all.per_step().observe(tokens)
        self._take(stats)

    def dropped(self, request_ids: Iterable[str]) -> None:
        """Records requests that were aborted or failed."""
        for request_id in request_ids:
            progress = self._requests.pop(request_id, None)
            if progress is not None:
                self._all.success(finished_reason="abort").inc()
                self._end_choice(progress)
        self._set_queue_gauges()

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Returns all metrics, and the media type of their format.

        That is Prometheus' text format, or OpenMetrics if the header Accept asks for it.
        """
        _, media_type = choose_encoder(accept)
        encode = generate_latest
        if media_type.startswith("application/openmetrics-text"):
            encode = openmetrics.generate_latest
        # Other kinds of escaping turn the colons of names into underscores in some versions.
        return encode(self._all.registry, escaping=openmetrics.ALLOWUTF8), media_type

    def _take(self, stats: EngineStats) -> None:
        if self.stats is None:
            self._compiled_at_ready = stats.compilations
        before, self.stats = self.stats or stats, stats
        self._all.preemptions().inc(stats.num_preemptions - before.num_preemptions)
        self._all.compilations().inc(stats.compilations - before.compilations)
        for usage in (self._all.usage, self._all.usage_by_old_name):
            usage().set(max(stats.used_pages) / stats.pages_per_device)
        for device, tokens in enumerate(stats.kv_tokens):
            self._all.kv_tokens(device=device).set(tokens)
        self._all.imbalance().set(max_over_mean(stats.kv_tokens))
        if stats.prefixes is not None:
            self._all.prefixes().set(stats.prefixes.count)
            self._all.prefix_bytes().set(stats.prefixes.bytes)
            self._all.prefix_copy_bytes().set(stats.prefixes.copied_bytes)
            self._all.prefix_sharing().set(stats.prefixes.sharing)
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
        self._all.generation_tokens().inc(new)
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
            for queries in (self._all.prefix_queries, self._all.prefix_queries_by_old_name):
                queries().inc(len(output.prompt_token_ids))
            for hits in (self._all.prefix_hits, self._all.prefix_hits_by_old_name):
                hits().inc(output.num_cached_tokens)

    def _start(self, output: RequestOutput, progress: _Progress, now: float) -> int:
        length = len(output.prompt_token_ids)
        progress.first_token = now
        self._all.prompt_tokens().inc(length)
        self._all.first_token().observe(now - progress.arrived)
        self.totals.prompts += 1
        self.totals.prompt_tokens += length
        self.totals.first_token_seconds += now - progress.arrived
        if output.kv_lengths is not None:
            self._all.kept().observe(float(output.kv_lengths.mean()) / length)
            self.totals.kept_tokens = self.totals.kept_tokens + output.kv_lengths
        return length

    def _observe_intervals(self, new: int, seconds: float) -> None:
        """Records intervals; tokens that arrive together share the time since the last token."""
        for _ in range(new):
            self._all.between().observe(seconds / new)
        self.totals.intervals += new
        self.totals.interval_seconds += seconds

    def _finish(self, output: RequestOutput, progress: _Progress, now: float) -> None:
        del self._requests[output.request_id]
        begun = progress.first_token or now
        self.totals.finished += 1
        self._all.success(finished_reason=output.outputs[0].finish_reason or "abort").inc()
        self._all.prompt_length().observe(len(output.prompt_token_ids))
        self._all.output_length().observe(progress.num_tokens)
        self._all.whole().observe(now - progress.arrived)
        if progress.max_tokens is not None:
            self._all.params_max_tokens().observe(progress.max_tokens)
        self._end_choice(progress)
        if progress.num_tokens > 1:
            self._all.per_token().observe((now - begun) / (progress.num_tokens - 1))
        self._observe_phases(output, progress)

    def _end_choice(self, progress: _Progress) -> None:
        """Records what is said of all choices together, when the last of them has ended."""
        choices = progress.choices
        choices.unfinished -= 1
        choices.longest = max(choices.longest, progress.num_tokens)
        if not choices.unfinished:
            self._all.params_n().observe(choices.num)
            self._all.longest_output().observe(choices.longest)

    def _observe_phases(self, output: RequestOutput, progress: _Progress) -> None:
        """Records the engine's times; time in the queue counts from the HTTP request's arrival."""
        times = output.metrics
        if times is None or times.first_scheduled_time is None:
            return
        first = times.prefill_finished_time or times.first_scheduled_time
        last = times.last_token_time or first
        self._all.queue().observe(max(times.first_scheduled_time - progress.arrived, 0))
        self._all.prefill().observe(first - times.first_scheduled_time)
        self._all.decode().observe(last - first)
        self._all.inference().observe(last - times.first_scheduled_time)

    def _set_queue_gauges(self) -> None:
        self._all.running().set(self.num_running)
        self._all.waiting().set(self.num_waiting)
        self._all.waiting_by_reason(reason="capacity").set(self.num_waiting)


def max_over_mean(loads: Sequence[int]) -> float:
    """Returns the largest load divided by the mean load, or 1 if all loads are 0."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
