"""The figures at /metrics, from requests whose timing the test decides."""

from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fairkv_jax.engine.request import CompletionOutput, Request, RequestOutput
from fairkv_jax.engine.stats import EngineStats, PrefixStats, RequestMetrics
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.serve.metrics import Metrics
from tests.serve.live import Server, eventually, running
from tests.serve.scripted import ScriptedEngine


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def output(
    request_id: str,
    tokens: int,
    reason: str | None = None,
    metrics: RequestMetrics | None = None,
) -> RequestOutput:
    completion = CompletionOutput("", list(range(tokens)), None, finish_reason=reason)
    kept = np.array([[2, 4], [6, 8]])
    finished = reason is not None
    return RequestOutput(request_id, None, [1] * 10, [completion], finished, kept, metrics=metrics)


def stats(running: int, waiting: int = 0, **more) -> EngineStats:
    known = {"num_preemptions": 0, "used_pages": (0, 0), "kv_tokens": (0, 0), "compilations": 40}
    return EngineStats(running, waiting, pages_per_device=8, **known | more)


def read(text: str) -> dict[str, float]:
    """Samples by name and, after it, what labels there are beside those that all have."""
    samples = {}
    named = ("model_name", "engine")
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [f"{k}={v}" for k, v in sample.labels.items() if k not in named]
            samples[" ".join([sample.name, *labels])] = sample.value
    return samples


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock, scripted: ScriptedEngine) -> Metrics:
    metrics = Metrics(clock)
    metrics.describe("model", scripted)
    metrics.stepped([], stats(0))
    return metrics


def test_tokens_are_looked_up_once_and_found(metrics: Metrics):
    """Only where prefixes are cached; a prompt counts when it has been read."""
    metrics.submitted([Request(name, [1] * 10) for name in "abc"])
    metrics.stepped([replace(output("a", 1), num_cached_tokens=4)], stats(1))
    cached = stats(1, prefixes=PrefixStats(3, 4096, 1024, 2.0))
    metrics.stepped([], cached)
    for tokens in (0, 1, 2):
        found = [replace(output(name, tokens), num_cached_tokens=6) for name in "b"]
        metrics.stepped(found, cached)
    metrics.stepped([output("c", 0)], cached)
    now = read(metrics.exposition()[0].decode())
    assert now["vllm:prefix_cache_queries_total"] == 10
    assert now["vllm:prefix_cache_hits_total"] == 6
    assert now["vllm:gpu_prefix_cache_queries_total"] == 10
    assert now["vllm:gpu_prefix_cache_hits_total"] == 6
    assert now["fairkv:prefixes"] == 3
    assert now["fairkv:prefix_bytes"] == 4096
    assert now["fairkv:prefix_copy_bytes"] == 1024
    assert now["fairkv:prefix_sharing"] == 2


def test_the_life_of_a_request(metrics: Metrics, clock: Clock):
    def now() -> dict[str, float]:
        return read(metrics.exposition()[0].decode())

    metrics.submitted([Request("a", [1] * 10), Request("b", [1] * 10)])
    assert (now()["vllm:num_requests_waiting"], now()["vllm:num_requests_running"]) == (2, 0)
    clock.now += 2
    metrics.stepped([output("a", 1)], stats(1, 1))
    assert (now()["vllm:num_requests_waiting"], now()["vllm:num_requests_running"]) == (1, 1)
    clock.now += 3
    metrics.stepped([output("a", 3)], stats(1, 1))  # two tokens at a time
    clock.now += 1
    times = RequestMetrics(100.5, 101.0, 101.75, 105.5)
    metrics.stepped([output("a", 4, "length", times)], stats(0, 1))
    metrics.dropped(["b", "a", "never seen"])
    final = now()
    assert (final["vllm:num_requests_waiting"], final["vllm:num_requests_running"]) == (0, 0)
    assert final["vllm:prompt_tokens_total"] == 10
    assert final["vllm:generation_tokens_total"] == 4
    assert final["vllm:request_success_total finished_reason=length"] == 1
    assert final["vllm:request_success_total finished_reason=abort"] == 1
    assert final["vllm:time_to_first_token_seconds_sum"] == 2
    assert final["vllm:inter_token_latency_seconds_count"] == 3
    assert final["vllm:inter_token_latency_seconds_sum"] == 4
    assert final["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(4 / 3)
    assert final["vllm:e2e_request_latency_seconds_sum"] == 6
    assert final["vllm:request_queue_time_seconds_sum"] == 1.0  # since it came, not was seen
    assert final["vllm:request_prefill_time_seconds_sum"] == 0.75
    assert final["vllm:request_decode_time_seconds_sum"] == 3.75
    assert final["vllm:request_inference_time_seconds_sum"] == 4.5
    assert final["vllm:request_prompt_tokens_sum"] == 10
    assert final["vllm:request_generation_tokens_sum"] == 4
    assert final["vllm:iteration_tokens_total_sum"] == 14
    assert final["fairkv:kept_fraction_sum"] == 0.5
    assert (final["fairkv:plan_utilization"], final["fairkv:plan_copies"]) == (1.0, 2)


def test_what_routers_read_is_there_before_the_first_request(metrics: Metrics):
    now = read(metrics.exposition()[0].decode())
    reasons = ("stop", "length", "abort", "error")
    names = [f"vllm:request_success_total finished_reason={reason}" for reason in reasons]
    names += [f"vllm:num_requests_waiting_by_reason reason={r}" for r in ("capacity", "deferred")]
    counted = ("prompt_tokens", "generation_tokens", "num_preemptions")
    counted += ("prefix_cache_queries", "prefix_cache_hits")
    counted += ("gpu_prefix_cache_queries", "gpu_prefix_cache_hits")
    names += [f"vllm:{name}_total" for name in counted]
    names += ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:gpu_cache_usage_perc"]
    assert {name: now[name] for name in names} == dict.fromkeys(names, 0)
    (cache,) = [name for name in now if name.startswith("vllm:cache_config_info")]
    assert {"block_size=16", "num_gpu_blocks=3750", "enable_prefix_caching=False"} < {
        *cache.split()
    }
    assert any(name.startswith("vllm:lora_requests_info max_lora=0") for name in now)


def test_choices_are_one_request(metrics: Metrics):
    """vLLM counts `n` and the longest choice once, when the last of them has ended."""
    params = SamplingParams(max_tokens=7)
    metrics.submitted([Request(name, [1] * 10, params, same_prompt="g") for name in "ab"])
    metrics.submitted([Request("c", [1] * 10, SamplingParams(max_tokens=None))])
    metrics.stepped([output("a", 7, "length")], stats(1))
    assert "vllm:request_params_n_count" not in read(metrics.exposition()[0].decode())
    metrics.stepped([output("b", 3, "stop"), output("c", 1, "stop")], stats(0))
    metrics.submitted([Request(name, [1] * 10, params, same_prompt="h") for name in "de"])
    metrics.stepped([output("d", 5, "length")], stats(1))
    metrics.dropped(["e"])
    now = read(metrics.exposition()[0].decode())
    assert (now["vllm:request_params_n_sum"], now["vllm:request_params_n_count"]) == (5, 3)
    assert now["vllm:request_max_num_generation_tokens_sum"] == 7 + 1 + 5
    assert now["vllm:request_params_max_tokens_sum"] == 3 * 7
    assert now["vllm:request_params_max_tokens_count"] == 3


def test_the_state_of_the_engine(metrics: Metrics):
    def now() -> dict[str, float]:
        return read(metrics.exposition()[0].decode())

    assert now()["fairkv:kv_load_max_over_mean"] == 1.0
    full = stats(0, used_pages=(2, 6), kv_tokens=(30, 90), num_preemptions=3, compilations=42)
    metrics.stepped([], full)
    metrics.stepped([], full)
    after = now()
    assert after["vllm:kv_cache_usage_perc"] == 0.75
    assert after["vllm:gpu_cache_usage_perc"] == 0.75
    assert after["vllm:num_preemptions_total"] == 3
    assert after["fairkv:compilations_after_ready_total"] == 2  # those before are no fault
    assert (after["fairkv:kv_tokens device=0"], after["fairkv:kv_tokens device=1"]) == (30, 90)
    assert after["fairkv:kv_load_max_over_mean"] == 1.5
    assert "vllm:iteration_tokens_total_count" not in after  # no tokens, no iteration


def test_every_sample_has_the_labels_that_dashboards_select_by(metrics: Metrics):
    """vLLM's are `model_name` and `engine`."""
    metrics.submitted([Request("a", [1] * 10)])
    metrics.stepped([output("a", 1), output("a", 2, "stop")], stats(1))
    families = text_string_to_metric_families(metrics.exposition()[0].decode())
    samples = [s for f in families for s in f.samples if s.name.startswith(("vllm:", "fairkv:"))]
    assert samples
    for sample in samples:
        assert (sample.labels["model_name"], sample.labels["engine"]) == ("model", "0")


def test_a_server_counts_what_it_serves(checkpoint: Path):
    slow = ScriptedEngine(checkpoint, step_seconds=0.02)

    def now(server: Server) -> dict[str, float]:
        return read(server.client.get("/metrics").text)

    with running(lambda: slow) as server:
        body = {"prompt": "x", "max_tokens": 5, "n": 2}
        assert server.client.post("/v1/completions", json=body).status_code == 200
        counted = now(server)
        assert counted["vllm:generation_tokens_total"] == 10
        assert counted["vllm:request_success_total finished_reason=length"] == 2
        assert counted["vllm:e2e_request_latency_seconds_count"] == 2
        long = {"prompt": "x", "max_tokens": 250, "n": 2, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=long) as response:
            lines = response.iter_lines()  # which hangs up once it is forgotten
            next(lines)
            eventually(lambda: now(server)["vllm:num_requests_running"] == 2)
            assert server.client.get("/load").json() == {"server_load": 1}
        eventually(lambda: now(server)["vllm:num_requests_running"] == 0)
        assert now(server)["vllm:request_success_total finished_reason=abort"] == 2


def test_metrics_are_there_before_the_model_is(client: httpx.Client):
    assert "process_resident_memory_bytes" in read(Metrics().exposition()[0].decode())
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")


def test_openmetrics_where_it_is_asked_for(server: Server):
    server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    response = server.client.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
    families = {
        family.name: family for family in openmetrics.text_string_to_metric_families(response.text)
    }
    assert families["vllm:generation_tokens"].type == "counter"
    assert families["vllm:generation_tokens"].samples[0].name == "vllm:generation_tokens_total"
    plain = server.client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert "# EOF" not in plain.text
