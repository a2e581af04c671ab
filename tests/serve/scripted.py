"""An engine without a model: what it says follows from the prompt, one token a step.

It keeps the contract of the real one, so that the server can be tested for everything that does
not depend on a model, failures in the middle of a step included.
"""

import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from fairkv_jax.checkpoint.open import open_checkpoint
from fairkv_jax.compress.budgets import num_kept_tokens, request_kv_config
from fairkv_jax.config import EngineConfig, GrammarLimits, KVConfig, ModelConfig
from fairkv_jax.engine.prefix_registry import PrefixRegistry
from fairkv_jax.engine.request import (
    CachedPrefix,
    CompletionOutput,
    Logprob,
    PrefixRecord,
    Request,
    RequestOutput,
    ValidatedRequest,
)
from fairkv_jax.engine.stats import (
    EngineStats,
    PrefixStats,
    RequestMetrics,
    RetainedPrefix,
)
from fairkv_jax.engine.structured_output import GrammarCompiler
from fairkv_jax.plan import CostModel, Plan
from fairkv_jax.plan.plan import Replica
from fairkv_jax.sampling_params import StructuredOutputsParams
from fairkv_jax.tokenizer import Tokenizer

PAGES = 1000
FIRST_LETTER = 3 + ord("a") - ord("!")  # ids 0 to 2 are control tokens, then bytes from "!" on
CRASH, NO_MEMORY = "crash", "no memory"


class ScriptedEngine:
    """Answers with letters; prompts of the texts `CRASH` and `NO_MEMORY` make their step fail.

    With `says`, every answer is that text instead, as long as there is room for it.
    """

    model_name = "scripted"

    def __init__(
        self,
        checkpoint: Path,
        *,
        max_num_seqs: int = 4,
        max_model_len: int = 512,
        step_seconds: float = 0.001,
        grammar_limits: GrammarLimits | None = None,
    ):
        opened = open_checkpoint(checkpoint)
        self.model_config: ModelConfig = opened.config
        self.tokenizer: Tokenizer = opened.tokenizer()
        self.engine_config = EngineConfig(
            tensor_parallel_size=2, max_model_len=max_model_len, max_num_seqs=max_num_seqs
        )
        self.kv_config = KVConfig("snapkv", budget=64)
        self.kv_capacity_tokens = 60_000
        self.plan = plan_of(self.model_config)
        self.prefixes = PrefixRegistry(self.model_config, self.kv_config)
        self.caching: dict[str, PrefixRecord] = {}
        self.step_seconds = step_seconds
        self.grammars = GrammarCompiler(
            self.tokenizer, self.model_config.vocab_size, grammar_limits
        )
        self.says: str | None = None
        self.aborted: list[str] = []
        self.num_validated = 0
        self.is_closed = False
        self.requests: dict[str, Request] = {}
        self.generated: dict[str, list[int]] = {}
        self.times: dict[str, RequestMetrics] = {}

    def compile_grammar(
        self, params: StructuredOutputsParams, cancelled: threading.Event | None = None
    ) -> None:
        """It is compiled, for its faults, and then takes no effect."""
        self.grammars.matcher(params, cancelled)

    def start_workers(self) -> None:
        self.grammars.warm_up()

    def validate(self, request: Request) -> ValidatedRequest:
        self.num_validated += 1
        length = len(request.prompt_token_ids)
        limit = self.engine_config.max_model_len
        if not 0 < length < limit:
            raise ValueError(f"a prompt of {length} tokens: 1 to {limit - 1} fit the context")
        vocab_size = self.model_config.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in request.prompt_token_ids):
            raise ValueError(f"a token id is not in the vocabulary [0, {vocab_size})")
        self._kept(request)
        if request.caches_prefix:
            return ValidatedRequest(request, 0, self.prefixes.record_of(request))
        if request.prefix_id is None:
            return ValidatedRequest(request, limit - length)
        record = self.prefixes.get(request.prefix_id, request.owner)
        whole = [*record.request.prompt_token_ids, *request.prompt_token_ids]
        request = replace(request, prompt_token_ids=whole)
        return ValidatedRequest(request, limit - len(whole), record)

    def add_request(self, request: Request | ValidatedRequest) -> None:
        if isinstance(request, Request):
            request = self.validate(request)
        if request.request.caches_prefix:
            assert request.prefix is not None
            self.caching[request.request_id] = request.prefix
        request, arrival_time = request.request, request.arrival_time
        self.requests[request.request_id] = request
        self.generated[request.request_id] = []
        self.times[request.request_id] = RequestMetrics(arrival_time)

    def abort_request(self, request_id: str) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def cached_prefix(self, prefix_id: str, owner: str = "") -> CachedPrefix:
        record = self.prefixes.get(prefix_id, owner)
        kept = self._kept(record.request)
        shape = (self.model_config.num_layers, self.model_config.num_kv_heads)
        return CachedPrefix(prefix_id, record.prefix.num_tokens, np.full(shape, kept), 1000 * kept)

    def delete_prefix(self, prefix_id: str, owner: str = "") -> None:
        self.prefixes.remove(prefix_id, owner)

    def close(self) -> None:
        self.is_closed = True

    def stats(self) -> EngineStats:
        """A running request takes two pages on the first device and one on the second."""
        running = min(len(self.requests), self.engine_config.max_num_seqs)
        return EngineStats(
            num_running=running,
            num_waiting=len(self.requests) - running,
            num_preemptions=0,
            used_pages=(2 * running, running),
            pages_per_device=PAGES,
            kv_tokens=(32 * running, 16 * running),
            compilations=7,
            prefixes=PrefixStats(
                count=12, bytes=5 << 20, copied_bytes=0, sharing=1.5 * (running > 0)
            ),
        )

    def retained_prefixes(self, most: int) -> list[RetainedPrefix]:
        return [RetainedPrefix(8000 - i, 1600.0, 3 << 20, 12 - i) for i in range(min(most, 12))]

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_seconds)
        running = list(self.requests.values())[: self.engine_config.max_num_seqs]
        for request in running:
            times = self.times[request.request_id]
            times.first_scheduled_time = times.first_scheduled_time or time.monotonic()
        if any(request.prompt == CRASH for request in running):
            raise RuntimeError("the device is on fire")
        if any(request.prompt == NO_MEMORY for request in running):
            raise MemoryError
        outputs = [self._advance(request) for request in running]
        for output in outputs:
            if output.finished:
                request = self.requests.pop(output.request_id)
                if request.caches_prefix:
                    record = self.caching.pop(request.request_id)
                    self.prefixes.add(record)
                    output.cached_prefix = self.cached_prefix(record.id, record.request.owner)
        return outputs

    def _advance(self, request: Request) -> RequestOutput:
        token_ids = self.generated[request.request_id]
        if request.sampling_params.max_tokens != 0:
            token_ids.append(self._next_token(request, len(token_ids)))
        times = self.times[request.request_id]
        times.last_token_time = time.monotonic()
        times.prefill_finished_time = times.prefill_finished_time or times.last_token_time
        text, reason, stop = self._text(request, token_ids)
        completion = CompletionOutput(
            text=text,
            token_ids=list(token_ids),
            logprobs=self._places(token_ids, request.sampling_params.logprobs),
            finish_reason=reason,
            stop_reason=stop,
        )
        of_prompt = self._places(request.prompt_token_ids, request.sampling_params.prompt_logprobs)
        shape = (self.model_config.num_layers, self.model_config.num_kv_heads)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=reason is not None,
            prompt_logprobs=None if of_prompt is None else [None, *of_prompt[1:]],
            kv_lengths=np.full(shape, self._kept(request)),
            metrics=replace(times),
        )

    def _next_token(self, request: Request, place: int) -> int:
        if self.says is not None:
            return self.tokenizer.encode(self.says)[place]
        return _next_token(request, place)

    def _kept(self, request: Request) -> int:
        given = request.kv_policy, request.kv_budget, request.kv_ratio
        wanted = request_kv_config(self.kv_config, *given)
        return num_kept_tokens(wanted, len(request.prompt_token_ids))

    def _text(self, request: Request, token_ids: list[int]) -> tuple[str, str | None, str | None]:
        """Text, finish reason and stop reason; what may become a stop string is held back."""
        params = request.sampling_params
        text = self.tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
        for stop in params.stop or ():
            if stop in text:
                shown = len(stop) if params.include_stop_str_in_output else 0
                return text[: text.index(stop) + shown], "stop", stop
        room = self.engine_config.max_model_len - len(request.prompt_token_ids)
        wanted = room if params.max_tokens is None else params.max_tokens
        if len(token_ids) >= min(wanted, room):
            return text, "length", None
        if self.says is not None and text == self.says:
            return text, "stop", None
        held_back = max((len(stop) - 1 for stop in params.stop or ()), default=0)
        return text[: len(text) - held_back], None, None

    def _places(self, token_ids: list[int], num_top: int | None) -> list[dict[int, Logprob]] | None:
        return None if num_top is None else [self._place(each, num_top) for each in token_ids]

    def _place(self, token_id: int, num_top: int) -> dict[int, Logprob]:
        """The chosen token is the second likeliest; the last of the top has no probability."""
        place = {token_id: Logprob(-1.0, 2, self.tokenizer.token_text(token_id))}
        for rank in range(1, num_top + 1):
            if rank != 2:
                other = FIRST_LETTER - 32 + rank  # upper case
                value = -math.inf if rank == num_top > 2 else -0.5 * rank
                place[other] = Logprob(value, rank, self.tokenizer.token_text(other))
        return place


def _next_token(request: Request, place: int) -> int:
    seed = request.sampling_params.seed or 0
    return FIRST_LETTER + (sum(request.prompt_token_ids) + seed + place * place) % 26


def plan_of(model: ModelConfig) -> Plan:
    """Heads 0 and 1 on a device each, head 2 halved between them."""
    shared = [Replica(2, device, 0.5) for device in (0, 1)]
    layer = (Replica(0, 0, 1.0), Replica(1, 1, 1.0), *shared)
    return Plan(
        strategy="fair_copying",
        row_split="equal",
        num_devices=2,
        num_heads=model.num_kv_heads,
        layers=(layer,) * model.num_layers,
        cost=CostModel(a_seconds=1.0, b_seconds_per_token=1.0, batch=1),
        utilization=1.0,
        step_seconds=1.0,
        lower_bound_seconds=1.0,
    )
