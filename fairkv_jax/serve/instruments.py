"""The gauges, counters and histograms of a server, with vLLM's names where vLLM has the metric."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)

_LABELS = ("model_name", "engine")
_ENGINE = "0"
"""vLLM labels every engine of a server with its index; this server has only one."""
_CACHE_CONFIG = (
    "block_size",
    "num_gpu_blocks",
    "cache_dtype",
    "enable_prefix_caching",
    "kv_cache_memory_bytes",
)
"""The labels of vllm:cache_config_info."""
_LORA = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
_FINISH_REASONS = ("stop", "length", "abort", "error")
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_LONG_SECONDS = (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CHOICES = (1, 2, 5, 10, 20)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))


class Instruments:
    """All metrics of one server, in a registry of its own.

    Called with the values of a metric's own labels, each returns its series of the served model.
    """

    def __init__(self) -> None:
        self.model_name = ""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._plain_counters: list[Callable[..., Counter]] = []
        """Those without labels of their own. They begin at 0, from which PromQL's rate() counts."""
        self._define_gauges()
        self._define_counters()
        self._define_histograms()

    def describe(self, model_name: str) -> None:
        """Names the model, and starts the series that are there before anything happens."""
        self.model_name = model_name
        for counter in self._plain_counters:
            counter()
        for reason in _FINISH_REASONS:
            self.success(finished_reason=reason)
        self.waiting_by_reason(reason="deferred").set(0)
        nothing = {"max_lora": 0, "waiting_lora_adapters": "", "running_lora_adapters": ""}
        self.lora_requests(**nothing).set_to_current_time()

    def _define_gauges(self) -> None:
        def gauge(name: str, text: str, *labels: str) -> Callable[..., Gauge]:
            return self._of_model(Gauge(name, text, [*_LABELS, *labels], registry=self.registry))

        self.running = gauge("vllm:num_requests_running", "Requests running.")
        self.waiting = gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.")
        self.waiting_by_reason = gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests waiting to be scheduled, all of them for capacity.",
            "reason",
        )
        self.usage = gauge(
            "vllm:kv_cache_usage_perc",
            "Fraction of KV pages in use on the fullest device; 1 means full.",
        )
        self.usage_by_old_name = gauge(
            "vllm:gpu_cache_usage_perc", "The older name of vllm:kv_cache_usage_perc."
        )
        self.cache_config = gauge(
            "vllm:cache_config_info",
            "The cache's options. num_gpu_blocks blocks of block_size tokens are what fits of all "
            "layers and heads, without compression.",
            *_CACHE_CONFIG,
        )
        self.lora_requests = gauge(
            "vllm:lora_requests_info", "LoRA adapters in use; this server has none.", *_LORA
        )
        self.kv_tokens = gauge(
            "fairkv:kv_tokens", "Cached tokens per device, summed over layers and heads.", "device"
        )
        self.imbalance = gauge(
            "fairkv:kv_load_max_over_mean",
            "Cached tokens on the fullest device, divided by the mean over devices.",
        )
        self.utilization = gauge(
            "fairkv:plan_utilization", "Utilization of the devices in attention that is planned."
        )
        self.prefixes = gauge("fairkv:prefixes", "Prefixes that are cached.")
        self.prefix_bytes = gauge(
            "fairkv:prefix_bytes", "Bytes of the KV pages of cached prefixes, over all devices."
        )
        self.prefix_copy_bytes = gauge(
            "fairkv:prefix_copy_bytes",
            "Bytes of these that copies of heads take, for rows on other devices.",
        )
        self.prefix_sharing = gauge(
            "fairkv:prefix_sharing",
            "Mean number of running requests that begin with the same cached prefix.",
        )
        self.replicas = gauge(
            "fairkv:plan_copies", "Extra head replicas of the plan, summed over layers."
        )

    def _define_counters(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            whole = Counter(name, text, [*_LABELS, *labels], registry=self.registry)
            of_model = self._of_model(whole)
            if not labels:
                self._plain_counters.append(of_model)
            return of_model

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prefilled prompt tokens.")
        self.prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."
        )
        self.prefix_hits = counter(
            "vllm:prefix_cache_hits", "Prompt tokens that were found in the prefix cache."
        )
        self.prefix_queries_by_old_name = counter(
            "vllm:gpu_prefix_cache_queries", "The older name of vllm:prefix_cache_queries."
        )
        self.prefix_hits_by_old_name = counter(
            "vllm:gpu_prefix_cache_hits", "The older name of vllm:prefix_cache_hits."
        )
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self.success = counter("vllm:request_success", "Finished requests.", "finished_reason")
        self.preemptions = counter(
            "vllm:num_preemptions", "Preemptions of requests because the KV cache was full."
        )
        self.compilations = counter(
            "fairkv:compilations_after_ready",
            "Programs compiled after the server was ready; 0 is expected.",
        )

    def _define_histograms(self) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Callable[..., Histogram]:
            whole = Histogram(name, text, _LABELS, registry=self.registry, buckets=buckets)
            return self._of_model(whole)

        def seconds(
            name: str, text: str, buckets: Sequence[float] = _LONG_SECONDS
        ) -> Callable[..., Histogram]:
            return histogram(f"vllm:{name}_seconds", text, buckets)

        self.first_token = seconds(
            "time_to_first_token", "Time from arrival to the first token.", _SECONDS
        )
        self.between = seconds(
            "inter_token_latency", "Time between consecutive tokens of a request.", _SECONDS
        )
        self.per_token = seconds(
            "request_time_per_output_token", "Mean time per output token of a request.", _SECONDS
        )
        self.whole = seconds("e2e_request_latency", "Time from arrival to the end of a request.")
        self.queue = seconds("request_queue_time", "Time from arrival to the start of prefill.")
        self.prefill = seconds(
            "request_prefill_time", "Time from the start of prefill to the first token."
        )
        self.decode = seconds("request_decode_time", "Time from the first token to the last.")
        self.inference = seconds("request_inference_time", "Time in prefill and decode.")
        self.prompt_length = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self.output_length = histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", _TOKENS
        )
        self.longest_output = histogram(
            "vllm:request_max_num_generation_tokens",
            "Generated tokens of a request's longest choice.",
            _TOKENS,
        )
        self.params_n = histogram("vllm:request_params_n", "Choices asked for (n).", _CHOICES)
        self.params_max_tokens = histogram(
            "vllm:request_params_max_tokens", "Tokens asked for at most (max_tokens).", _TOKENS
        )
        self.per_step = histogram(
            "vllm:iteration_tokens_total", "Prefilled and generated tokens per step.", _TOKENS
        )
        self.kept = histogram(
            "fairkv:kept_fraction", "Fraction of a prompt's tokens kept per head.", _TENTHS
        )

    def _of_model(self, metric: _Metric) -> Callable[..., _Metric]:
        return lambda **more: metric.labels(model_name=self.model_name, engine=_ENGINE, **more)
