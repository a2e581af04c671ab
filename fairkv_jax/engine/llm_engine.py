"""Serves requests: schedule, execute, process."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.budgets import check_least_kept, num_kept_tokens, request_kv_config
from fairkv_jax.compress.registry import make_method
from fairkv_jax.config import EngineConfig, GrammarLimits, KVConfig
from fairkv_jax.engine.compiling import Compilations
from fairkv_jax.engine.device_errors import STEP_DOES_NOT_FIT, translate_xla_errors
from fairkv_jax.engine.execution import Execution
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.output_processor import OutputProcessor, answer_token_ids
from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.prefix_registry import PrefixRegistry
from fairkv_jax.engine.request import (
    CachedPrefix,
    Part,
    PrefixRecord,
    Request,
    RequestOutput,
    ValidatedRequest,
)
from fairkv_jax.engine.schedule_log import ScheduleLog
from fairkv_jax.engine.scheduled_request import ScheduledRequest, Segment
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.engine.scheduler_output import NewRequest, NewTokens
from fairkv_jax.engine.segments import divide, finished_turn, segments_of
from fairkv_jax.engine.stats import EngineStats, PrefixStats, RetainedPrefix
from fairkv_jax.engine.structured_output import GrammarCompiler
from fairkv_jax.engine.timings import StepTimer
from fairkv_jax.plan import Plan
from fairkv_jax.sampling_params import (
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    StructuredOutputsParams,
)


class LLMEngine:
    """Serves requests that come and go at any step; one thread calls it.

    A step schedules executions, gives them to the devices, and processes the result of the oldest
    one. Up to two executions are in flight, so that the devices do not wait for the host. What is
    scheduled, and why, is said in `Scheduler`. A schedule log, if given, receives everything that
    is executed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        engine_config: EngineConfig,
        kv_config: KVConfig,
        *,
        grammar_limits: GrammarLimits | None = None,
        progress: bool = True,
        schedule_log: ScheduleLog | None = None,
        make_runner: Callable[..., ModelRunner] = ModelRunner,
    ):
        """`make_runner` takes the arguments of `ModelRunner`."""
        self.model_name = checkpoint.name
        self.model_config = checkpoint.config
        self.engine_config, self.kv_config, self.plan = engine_config, kv_config, plan
        self.tokenizer = checkpoint.tokenizer()
        self.runner = make_runner(
            checkpoint,
            plan,
            engine_config,
            kv_config,
            eos_token_ids=self.tokenizer.eos_token_ids,
            progress=progress,
        )
        self.output_processor = OutputProcessor(self.tokenizer)
        self.scheduler = Scheduler(
            KVCacheManager(self.runner.cache_spec, self.runner.layout),
            self.output_processor.grammar_bitmask,
            engine_config.prefix_cache_fraction,
            self.runner.decode_compression,
            self.runner.packing,
        )
        self.prefixes = PrefixRegistry(self.model_config, kv_config)
        """Prefixes that have been cached by requests, see `Request.caches_prefix`."""
        self._caching: dict[str, PrefixRecord] = {}
        """By the id of the unfinished request that computes it."""
        self._whole_prompts: WeakValueDictionary[str, Prefix] = WeakValueDictionary()
        """Prompts of several unfinished requests, by `Request.same_prompt`."""
        self._turns: dict[str, ValidatedRequest] = {}
        """Unfinished requests whose prompt and output others may begin with, by id."""
        self._grammars = GrammarCompiler(
            self.tokenizer, self.model_config.vocab_size, grammar_limits or GrammarLimits()
        )
        self._arrivals = itertools.count()
        self._compilations = Compilations()
        self._seeds = np.random.default_rng(engine_config.seed)
        self._timer = StepTimer()
        self._schedule_log = schedule_log
        self._outputs: list[RequestOutput] = []
        """Outputs that have not been returned: a step that fails leaves them to the next one."""
        self._in_flight: deque[tuple[Execution, float]] = deque()
        """With the time when each was given to the devices."""

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of a sequence, in all its layers and heads, that the cache holds uncompressed."""
        spec, model = self.runner.cache_spec, self.model_config
        pages = spec.pages_per_device * spec.num_devices
        return pages * spec.page_size // (model.num_layers * model.num_kv_heads)

    def warm_up(
        self,
        prompt_lengths: Iterable[int],
        num_requests: int,
        *,
        suffix_lengths: Iterable[int] = (),
        prompt_logprobs: bool = True,
        forks: bool = False,
    ) -> None:
        """Compiles everything that requests of these prompt lengths run, with a progress bar.

        `suffix_lengths` are those of what follows a cached prefix; `forks` says whether requests
        may have the same prompt.
        """
        self.runner.warm_up(
            prompt_lengths,
            min(num_requests, self.engine_config.max_num_seqs),
            suffix_lengths=suffix_lengths,
            prompt_logprobs=prompt_logprobs,
            forks=forks,
        )

    def stats(self) -> EngineStats:
        """What runs and waits, and how full the cache is; for the thread that calls `step`."""
        kv_cache = self.scheduler.kv_cache
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            used_pages=tuple(kv_cache.used_pages.tolist()),
            pages_per_device=kv_cache.spec.pages_per_device,
            kv_tokens=tuple(kv_cache.tokens_per_device.sum(0).tolist()),
            compilations=self._compilations.count,
            prefixes=self._prefix_stats(),
        )

    def retained_prefixes(self, most: int) -> list[RetainedPrefix]:
        """Returns the prefixes whose cache is there, the most recently used first; at most `most`.

        Any thread may call it.
        """
        page_bytes = self.runner.cache_spec.page_bytes
        retained = []
        for prefix in self.scheduler.prefixes.recently_used(most):
            places, kept = prefix.places, prefix.head_lengths
            if places and kept is not None:  # it has not been evicted meanwhile
                size = sum(len(place.pages) for place in places) * page_bytes
                users = len(prefix.users)
                retained.append(RetainedPrefix(prefix.num_tokens, float(kept.mean()), size, users))
        return retained

    def has_unfinished_requests(self) -> bool:
        """Whether requests wait or run, or have ended in a step that failed later."""
        return len(self.scheduler) > 0 or bool(self._outputs)

    def compile_grammar(
        self, params: StructuredOutputsParams, cancelled: threading.Event | None = None
    ) -> None:
        """Compiles the grammar that later requests will bring; any thread may call it.

        It can take twice the time of the limit. `cancelled`, when it is set, ends it early.

        Raises:
            ValueError: the schema or grammar has a fault or is beyond the limits; see
                `GrammarCompiler.matcher`, also for the other errors.
        """
        self._grammars.matcher(params, cancelled)

    def start_workers(self) -> None:
        """Starts the worker processes, so that the first requests do not have to wait for them."""
        self._grammars.warm_up()
        self.tokenizer.warm_up()

    def validate(self, request: Request) -> ValidatedRequest:
        """Checks a request against the model's limits; any thread may call it.

        Raises:
            ValueError: the prompt is empty, too long, or holds ids outside the vocabulary; a
                sampling option does; the grammar has a fault; more is to be kept of the prompt
                than the engine allows; or the prefix is unknown or cannot be cached.
        """
        prompt, limit = request.prompt_token_ids, self.engine_config.max_model_len
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        self._check_length(len(prompt))
        vocab_size = self.model_config.vocab_size
        for token_id in prompt:
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"token id {token_id} is not in the vocabulary [0, {vocab_size})")
        record = self._prefix_of(request)
        if record is not None and not request.caches_prefix:
            prompt = [*record.request.prompt_token_ids, *prompt]
            self._check_length(len(prompt))
        self._check_sampling_params(request.sampling_params)
        self._check_kv_options(request)
        room, wanted = limit - len(prompt), request.sampling_params.max_tokens
        if request.caches_prefix:
            room = 0
        max_tokens = room if wanted is None else min(wanted, room)
        start = len(prompt) - len(request.prompt_token_ids)
        boundaries = [replace(each, position=start + each.position) for each in request.boundaries]
        request = replace(request, prompt_token_ids=prompt, boundaries=tuple(boundaries))
        parts = () if request.caches_prefix else self._parts(request, start)
        outputs = request.sampling_params.structured_outputs
        matcher = None if outputs is None else self._grammars.matcher(outputs)
        return ValidatedRequest(request, max_tokens, record, matcher, parts)

    def add_request(self, request: Request | ValidatedRequest) -> None:
        """Puts a request into the queue; it is validated first unless it has been already.

        Raises:
            ValueError: see `validate`; or a request of that id is unfinished.
        """
        valid = request if isinstance(request, ValidatedRequest) else self.validate(request)
        request, params = valid.request, valid.request.sampling_params
        if request.request_id in self.scheduler:
            raise ValueError(f"a request with the id {request.request_id!r} is still running")
        seed = self._seeds.integers(2**63) if params.seed is None else params.seed
        new = NewRequest(
            request.request_id,
            request.prompt_token_ids,
            params,
            int(seed),
            return_kept_positions=request.return_kept_positions,
        )
        if request.caches_prefix and valid.prefix is not None:
            self._caching[request.request_id] = valid.prefix
        if request.may_continue and self._divides(request):
            self._turns[request.request_id] = valid
        self.output_processor.add(
            request,
            max_tokens=valid.max_tokens,
            arrival_time=valid.arrival_time,
            matcher=None if valid.matcher is None else valid.matcher.copy(),
        )
        self.scheduler.add(
            ScheduledRequest(
                new,
                arrival=next(self._arrivals),
                max_tokens=valid.max_tokens,
                segments=self.segments(valid),
                follows_grammar=valid.matcher is not None,
                whole_prompt=self._whole_prompt(request),
            )
        )

    def abort_request(self, request_id: str) -> None:
        """Ends a request wherever it is; its pages are free at once. Unknown ids are ignored."""
        self.scheduler.abort(request_id)
        self.output_processor.abort(request_id)
        self._caching.pop(request_id, None)
        self._turns.pop(request_id, None)
        self._outputs = [each for each in self._outputs if each.request_id != request_id]
        self._drop_unneeded_executions()

    def cached_prefix(self, prefix_id: str, owner: str = "") -> CachedPrefix:
        """Describes a prefix that a request has cached.

        Raises:
            UnknownPrefix: there is none with this id and owner.
        """
        prefix, spec = self.prefixes.get(prefix_id, owner).prefix, self.runner.cache_spec
        kept = prefix.head_lengths
        assert kept is not None
        num_pages = int((-(-kept // spec.page_size)).sum())
        return CachedPrefix(prefix.key, prefix.num_tokens, kept, num_pages * spec.page_bytes)

    def delete_prefix(self, prefix_id: str, owner: str = "") -> None:
        """Forgets a prefix; requests that use it finish, and its pages are free afterwards.

        Raises:
            UnknownPrefix: there is none with this id and owner.
        """
        self.scheduler.prefixes.delete(self.prefixes.remove(prefix_id, owner).prefix)

    def close(self) -> None:
        """Closes the schedule log, if there is one; later steps are not logged."""
        if self._schedule_log is not None:
            self._schedule_log.close()

    def step(self) -> list[RequestOutput]:
        """Runs one iteration and returns the outputs that have changed.

        After an exception all requests are still there, and further steps go on with them.

        Raises:
            DeviceError: the devices failed, or have too little memory.
        """
        try:
            with translate_xla_errors("running a step", STEP_DOES_NOT_FIT):
                return self._step()
        except BaseException:
            self._reset()
            raise

    def _step(self) -> list[RequestOutput]:
        self._process(self.scheduler.take_cached(), time.monotonic())
        while len(self._in_flight) < self.runner.max_in_flight and self._execute_next():
            pass
        if not self._in_flight:
            return self._take_outputs()
        execution, start = self._in_flight.popleft()
        result, now = execution.result(), time.monotonic()
        if self._schedule_log is not None:
            self._schedule_log.write_result(execution.output, result)
        self._timer.record(execution.output, None if execution.has_compiled else start, now)
        self._process(self.scheduler.update(execution.output, result), now)
        self._drop_unneeded_executions()
        return self._take_outputs()

    def _process(self, new_tokens: list[NewTokens], now: float) -> None:
        """Adds new tokens to their outputs, and ends the requests that have all of theirs."""
        outputs = self.output_processor.process(new_tokens, now)
        self._outputs += outputs
        for output in outputs:
            if output.finished:
                record = self._caching.pop(output.request_id, None)
                if record is not None:
                    replaced = self.prefixes.add(record)
                    if replaced is not None:
                        self.scheduler.prefixes.delete(replaced.prefix)
                    output.cached_prefix = self.cached_prefix(record.id, record.request.owner)
                turn = self._turns.pop(output.request_id, None)
                if turn is not None and output.error is None:
                    self._retain_turn(turn, output)
                self.scheduler.abort(output.request_id)

    def _retain_turn(self, turn: ValidatedRequest, output: RequestOutput) -> None:
        """Keeps what the next turn of a conversation will begin with, before its row is freed."""
        answer = answer_token_ids(output.outputs[0], self.tokenizer.eos_token_ids)
        for prefix in finished_turn(
            turn, answer, self.model_config, self.engine_config, self.kv_config, self.prefixes
        ):
            self.scheduler.retain(output.request_id, prefix)

    def _take_outputs(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _execute_next(self) -> bool:
        """Gives the devices the next output, unless it depends on results that must come first."""
        output, start = self.scheduler.schedule(self._timer.timings), time.monotonic()
        if output is None:
            return False
        if self._schedule_log is not None:
            self._schedule_log.write_output(output)
        self._in_flight.append((self.runner.execute(output), start))
        if output.prefill is not None:
            if output.prefill.start == 0:
                self.output_processor.started(output.prefill.request_id, start)
            for each in (*output.prefill.also_samples, *output.prefill.packed):
                self.output_processor.started(each.request_id, start)
        return True

    def _reset(self) -> None:
        """Puts all requests back into the queue with an empty cache, after a failed step.

        Only tokens that have been returned to clients are kept.
        """
        self._in_flight.clear()
        self.scheduler.reset(self.output_processor.token_ids)

    def _drop_unneeded_executions(self) -> None:
        """Drops executions in flight if no request is left: idle time must not count as theirs."""
        if not len(self.scheduler) and self._in_flight:
            self._in_flight.clear()
            self.scheduler.forget_results()

    def _check_length(self, num_tokens: int) -> None:
        limit = self.engine_config.max_model_len
        if num_tokens >= limit:
            raise ValueError(
                f"the prompt has {num_tokens} tokens, but max_model_len {limit} must hold it and "
                f"at least one generated token: shorten it to {limit - 1} or raise max_model_len"
            )

    def _check_sampling_params(self, params: SamplingParams) -> None:
        vocab_size = self.model_config.vocab_size
        for token_id in dict(params.logit_bias or {}):
            if token_id >= vocab_size:
                raise ValueError(
                    f"token id {token_id} in logit_bias is not in the vocabulary [0, {vocab_size})"
                )
        ends = {*self.tokenizer.eos_token_ids, *(params.stop_token_ids or ())}
        if params.min_tokens and len(ends) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"min_tokens holds back at most {MAX_STOP_TOKEN_IDS} stop_token_ids and ends of "
                f"text, got {len(ends)}: give fewer stop_token_ids"
            )

    def _prefix_of(self, request: Request) -> PrefixRecord | None:
        """The prefix that a request begins with, or caches."""
        if request.prefix_id is None and not request.caches_prefix:
            return None
        if not self.engine_config.enable_prefix_caching:
            raise ValueError("prefixes are not cached: start with enable_prefix_caching")
        if request.sampling_params.prompt_logprobs is not None or request.return_kept_positions:
            raise ValueError(
                "log-probabilities and kept positions of a prompt are not available where it "
                "begins with a cached prefix: leave out prefix_id, or do not ask for them"
            )
        if request.caches_prefix:
            self._check_kv_options(request)
            return self.prefixes.record_of(request)
        assert request.prefix_id is not None
        given = (request.kv_policy, request.kv_budget, request.kv_ratio)
        if self.kv_config.suffix == "keep" and given != (None, None, None):
            raise ValueError(
                "what follows a cached prefix is kept whole, so kv_policy, kv_budget and kv_ratio "
                "have no effect on it: leave them out, or start with kv_suffix compress"
            )
        return self.prefixes.get(request.prefix_id, request.owner)

    def segments(self, valid: ValidatedRequest) -> tuple[Segment, ...]:
        """The parts in which a prompt is prefilled and compressed."""
        return segments_of(
            valid,
            self.model_config,
            self.engine_config,
            self.kv_config,
            self.prefixes,
            self.runner.instruction,
        )

    def _prefix_stats(self) -> PrefixStats | None:
        if not self.engine_config.enable_prefix_caching:
            return None
        prefixes = self.scheduler.prefixes
        begun = [each.prefix for each in self.scheduler.running.values() if each.prefix is not None]
        page_bytes = self.runner.cache_spec.page_bytes
        size = int(prefixes.num_pages.sum()) * page_bytes
        copies = sum(len(each.pages) for prefix in prefixes for each in prefix.copies)
        sharing = len(begun) / max(len(set(begun)), 1)
        return PrefixStats(len(prefixes), size, copies * page_bytes, sharing)

    def _whole_prompt(self, request: Request) -> Prefix | None:
        """What requests with the same prompt share; its pages go when none waits for them."""
        name = request.same_prompt
        if not name:
            return None
        prompt = self._whole_prompts.get(name)
        if prompt is None:
            prompt = Prefix(name, len(request.prompt_token_ids), is_deleted=True)
            self._whole_prompts[name] = prompt
        return prompt

    def _divides(self, request: Request) -> bool:
        """Whether a prompt's segments may be cached for other requests.

        They are not where its own log-probabilities or kept positions are asked for.
        """
        return (
            self.engine_config.enable_prefix_caching
            and request.sampling_params.prompt_logprobs is None
            and not request.return_kept_positions
        )

    def _parts(self, request: Request, start: int) -> tuple[Part, ...]:
        """The parts of a prompt from `start` on, where the prefix that it names ends."""
        return divide(
            request,
            start,
            len(request.prompt_token_ids),
            request.boundaries if self._divides(request) else (),
            self.model_config,
            self.kv_config,
            self.engine_config.prefix_min_tokens,
        )

    def _check_kv_options(self, request: Request) -> None:
        wanted = request_kv_config(
            self.kv_config, request.kv_policy, request.kv_budget, request.kv_ratio
        )
        make_method(wanted)
        num_tokens = len(request.prompt_token_ids)
        asked, own = (request.kv_budget, request.kv_ratio), self.kv_config
        if asked not in ((None, None), (own.budget, own.ratio)):
            check_least_kept(wanted, num_tokens)
        kept, most = (num_kept_tokens(each, num_tokens) for each in (wanted, self.kv_config))
        if kept > most:
            given, remedy = f"kv_budget {kept}", "lower it"
            if request.kv_ratio is not None:
                given, remedy = f"kv_ratio {request.kv_ratio}, which keeps {kept},", "raise it"
            raise ValueError(
                f"{given} is beyond the {most} tokens per head that are kept of a prompt of "
                f"{num_tokens}: {remedy}, or let the engine itself keep more"
            )
