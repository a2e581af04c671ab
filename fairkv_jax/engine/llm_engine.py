"""Requests in, tokens out: continuous batching over the engine's three verbs."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import numpy as np

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.compress.budgets import num_kept_tokens, request_kv_config
from fairkv_jax.compress.registry import make_method
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.decode import DecodeInputs
from fairkv_jax.engine.compiling import Compilations
from fairkv_jax.engine.device_errors import STEP_DOES_NOT_FIT, translate_xla_errors
from fairkv_jax.engine.engine import Engine, PrefillTask
from fairkv_jax.engine.guided import Grammars
from fairkv_jax.engine.pacing import Pacer
from fairkv_jax.engine.request import Logprob, Request, RequestOutput
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.engine.sequence import Sequence
from fairkv_jax.engine.stats import EngineStats
from fairkv_jax.plan import Plan
from fairkv_jax.prefill import CompressedPrefix, kept_tokens
from fairkv_jax.sampling import Sampled, SamplingState, mask_words
from fairkv_jax.sampling_params import (
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    StructuredOutputsParams,
)

log = logging.getLogger(__name__)

_IDLE_ROW = (SamplingParams(temperature=0), 0)


@dataclass(frozen=True)
class _Dispatch:
    """Decode steps that the devices have been given, and what is to be known of them."""

    sampled: Sampled
    """On the devices, perhaps not computed yet."""
    num_steps: int
    places: dict[int, tuple[Sequence, int]]
    """By row: who sat there, and the place in its output of the first token."""
    prefill_work: float
    """Of the part of a prefill that went before."""
    start: float | None
    """When it was given; None where that included compiling."""

    def has_readers(self, running: dict[int, Sequence]) -> bool:
        """Whether anybody still runs who sat there."""
        return any(running.get(row) is sequence for row, (sequence, _) in self.places.items())


class LLMEngine:
    """Serves requests that come and go at any step; one thread calls it.

    Every step brings the prefill of the oldest waiting request forward, for no longer than the
    running ones can bear, and generates tokens for those. While nobody can be admitted, several
    steps are dispatched at once, and the next ones before the last are read, so that the devices do
    not wait for the host. When pages run out, the newest request is preempted: its prompt is
    prefilled again later and its generated tokens are replayed, so that its output does not change.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        engine_config: EngineConfig,
        kv_config: KVConfig,
        *,
        progress: bool = True,
    ):
        self.model_name = checkpoint.name
        self.model_config = checkpoint.config
        self.engine_config, self.kv_config, self.plan = engine_config, kv_config, plan
        self.tokenizer = checkpoint.tokenizer()
        self.engine = Engine(checkpoint, plan, engine_config, kv_config, progress=progress)
        self.scheduler = Scheduler(engine_config.max_num_seqs)
        self._grammars = Grammars(self.tokenizer, self.model_config.vocab_size)
        self._arrivals = itertools.count()
        self._num_preemptions = 0
        self._compilations = Compilations()
        self._seeds = np.random.default_rng(engine_config.seed)
        self._sampling: SamplingState | None = None
        """The rows' options on the devices; None when the rows have changed."""
        self._unguided: dict[int, jax.Array] = {}
        """By batch: what stands for the masks of rows that are not guided."""
        self._pacer = Pacer()
        self._prefill_work = 0.0
        """Given to the devices since the last dispatch of decode steps."""
        self._in_flight: deque[_Dispatch] = deque()
        self._last_read = 0.0

    @property
    def kv_capacity_tokens(self) -> int:
        return self.engine.kv_capacity_tokens

    def warm_up(
        self, prompt_lengths: Iterable[int], num_requests: int, *, prompt_logprobs: bool = True
    ) -> None:
        """Compiles all that requests of these prompt lengths run, with a progress bar."""
        rows = min(num_requests, self.engine_config.max_num_seqs)
        self.engine.warm_up(prompt_lengths, rows, prompt_logprobs=prompt_logprobs)

    def stats(self) -> EngineStats:
        """What runs and waits, and how full the pool is; for the thread that calls `step`."""
        book = self.engine.book
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self._num_preemptions,
            used_pages=tuple(book.used_pages.tolist()),
            pages_per_device=book.pages_per_device,
            kv_tokens=tuple(book.load.sum(0).tolist()),
            compilations=self._compilations.count,
        )

    def has_unfinished_requests(self) -> bool:
        return len(self.scheduler) > 0

    def compile_grammar(self, params: StructuredOutputsParams) -> None:
        """Compiles what outputs must match, for the requests that will come with it.

        It can take a second; any thread may call it.

        Raises:
            ValueError: it has a fault, which the message names.
        """
        self._grammars.matcher(params)

    def validate(self, request: Request) -> None:
        """Checks a request against the model's limits.

        Raises:
            ValueError: the prompt is empty, too long, or holds ids that are not in the vocabulary,
                as may the sampling options; what the output must match has a fault; or more is to
                be kept of the prompt than the engine allows.
        """
        prompt, limit = request.prompt_token_ids, self.engine_config.max_model_len
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but max_model_len {limit} must hold it and "
                f"at least one generated token: shorten it to {limit - 1} or raise max_model_len"
            )
        vocab_size = self.model_config.vocab_size
        for token_id in prompt:
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"token id {token_id} is not in the vocabulary [0, {vocab_size})")
        self._check_options(request.sampling_params)
        self._kv_config(request)

    def add_request(self, request: Request) -> None:
        """Puts a request into the queue.

        Raises:
            ValueError: see `validate`; or a request of that id is there already.
        """
        self.validate(request)
        if self.scheduler.has(request.request_id):
            raise ValueError(f"a request with the id {request.request_id!r} is still running")
        params = request.sampling_params
        outputs = params.structured_outputs
        room = self.engine_config.max_model_len - len(request.prompt_token_ids)
        seed = self._seeds.integers(2**63) if params.seed is None else params.seed
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.scheduler.waiting.append(
            Sequence(
                request,
                self.tokenizer,
                arrival=next(self._arrivals),
                seed=int(seed),
                max_tokens=max_tokens,
                kv_config=self._kv_config(request),
                matcher=self._grammars.matcher(outputs) if outputs is not None else None,
            )
        )

    def abort_request(self, request_id: str) -> None:
        """Ends a request wherever it is; its pages are free at once. Unknown ids are ignored."""
        row = self.scheduler.row_of(request_id)
        if row is not None:
            self._leave(row)
        else:
            self.scheduler.drop_waiting(request_id)

    def step(self) -> list[RequestOutput]:
        """Admits, generates, and returns the state of every request that advanced.

        After an exception the requests are all still there, and further steps go on with them.

        Raises:
            DeviceError: the devices failed, or have too little memory.
        """
        try:
            with translate_xla_errors("running a step", STEP_DOES_NOT_FIT):
                return [sequence.output() for sequence in self._step()]
        except BaseException:
            self._start_over()
            raise

    def _step(self) -> dict[Sequence, None]:
        """Who advanced."""
        advanced: dict[Sequence, None] = {}
        if self.scheduler.first_waiting is not None:
            while self._in_flight:
                advanced |= self._read()
            advanced |= self._admit()
        # Only while nobody can be admitted is more dispatched than is read at once.
        depth = 2 if self.scheduler.first_waiting is None else 1
        while len(self._in_flight) < depth and self._dispatch():
            pass
        if self._in_flight:
            advanced |= self._read()
        return advanced

    def _check_options(self, params: SamplingParams) -> None:
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
        if params.structured_outputs is not None:
            self.compile_grammar(params.structured_outputs)

    def _kv_config(self, request: Request) -> KVConfig:
        """What is kept of the request's prompt; see `validate`."""
        wanted = request_kv_config(self.kv_config, request.kv_policy, request.kv_budget)
        make_method(wanted)
        num_tokens = len(request.prompt_token_ids)
        kept = num_kept_tokens(wanted, num_tokens)
        most = num_kept_tokens(self.kv_config, num_tokens)
        if kept > most:
            raise ValueError(
                f"kv_budget {kept} is beyond the {most} tokens a head that are kept of a prompt of "
                f"{num_tokens}: lower it, or raise the engine's own"
            )
        return wanted

    def _admit(self) -> dict[Sequence, None]:
        """Brings the oldest waiting request forward; starts it if it is done and there is room."""
        sequence = self.scheduler.first_waiting
        if sequence is None:
            return {}
        if sequence.prefill is None:
            sequence.scheduled()
            sequence.prefill = self.engine.start_prefill(
                sequence.request.prompt_token_ids,
                sequence.kv_config,
                wants_logprobs=sequence.wants_prompt_logprobs,
            )
        prefill = sequence.prefill
        if not prefill.is_done:
            self._advance(prefill)
        if not prefill.is_done:
            return {}
        prefix = prefill.prefix
        placement = self.engine.place(prefix, len(sequence.token_ids))
        if placement.missing_pages.any() and sequence.wants_tokens:
            return {}  # it waits for pages
        advanced: dict[Sequence, None] = {}
        if not sequence.token_ids:  # else it was preempted: its first token is known
            wants_positions = sequence.request.return_kept_positions
            sequence.kept = kept_tokens(prefix, self.engine.layout, positions=wants_positions)
            if sequence.wants_prompt_logprobs:
                sequence.prompt_logprobs = self._prompt_logprobs(sequence, prefill)
            if sequence.wants_tokens:
                self._append(sequence, self._sample_first(sequence, prefix), 0)
            else:
                sequence.end_with_prompt()
            advanced[sequence] = None
        if sequence.finish_reason:
            self.scheduler.waiting.popleft()
        else:
            row = self.scheduler.free_row
            self.engine.insert(prefix, row, placement, sequence.all_token_ids)
            self.scheduler.start()
            self._sampling = None
            sequence.num_cached = 0
        sequence.prefill = None
        return advanced

    def _sample_first(self, sequence: Sequence, prefix: CompressedPrefix) -> Sampled:
        """The first token of an output."""
        allowed = None if sequence.matcher is None else sequence.matcher.allowed()
        prompt = sequence.request.prompt_token_ids
        sampling = self._stack([(sequence.params, sequence.seed)])
        return jax.device_get(self.engine.sample_first(prefix, sampling, prompt, allowed))

    def _prompt_logprobs(
        self, sequence: Sequence, prefill: PrefillTask
    ) -> list[dict[int, Logprob] | None]:
        count = sequence.params.prompt_logprobs or 0
        if prefill.num_tokens == 1:
            return [None]
        scores = self.engine.prompt_scores(prefill)
        return [None, *(self._ranked(scores, i, count) for i in range(prefill.num_tokens - 1))]

    def _advance(self, prefill: PrefillTask) -> None:
        """Runs the next part of a prefill: short beside running requests, longer alone."""
        is_alone = not self.scheduler.running
        units = self.engine.units_of(prefill, self._pacer.prefill_work(is_alone=is_alone))
        work = self.engine.work_of(prefill, units)
        programs, start = self.engine.num_programs, time.monotonic()
        self.engine.advance_prefill(prefill, units)
        if not is_alone:
            self._prefill_work += work
            return
        jax.block_until_ready((prefill.state, prefill.scores))
        if self.engine.num_programs == programs:
            self._pacer.prefilled(work, 0, time.monotonic() - start)

    def _dispatch(self) -> bool:
        """Gives the devices decode steps for all running requests, unless these must wait.

        They must where one of them has all its tokens with what is under way, where its grammar
        has to see them first, or where that may yet free the pages that they need.
        """
        running, book = self.scheduler.running, self.engine.book
        left = min((sequence.num_left for sequence in running.values()), default=0)
        is_guided = any(sequence.matcher is not None for sequence in running.values())
        if left == 0 or (is_guided and self._in_flight):
            return False
        is_single = is_guided or self.scheduler.first_waiting is not None
        num_steps = 1 if is_single else min(left, self._pacer.num_steps)
        if book.missing_pages(num_steps).any():
            num_steps = 1
        while book.missing_pages().any():
            if self._in_flight:
                return False
            self.scheduler.wait_first(self._leave(self.scheduler.newest()))
            self._num_preemptions += 1
        programs, start = self.engine.num_programs, time.monotonic()
        sampled = self.engine.generate(self._rows(), num_steps)
        places = {row: (sequence, sequence.num_cached + 1) for row, sequence in running.items()}
        for sequence in running.values():
            sequence.num_cached += num_steps
        compiled = self.engine.num_programs > programs
        self._in_flight.append(
            _Dispatch(sampled, num_steps, places, self._prefill_work, None if compiled else start)
        )
        self._prefill_work = 0.0
        return True

    def _read(self) -> dict[Sequence, None]:
        """Waits for the oldest dispatched steps and hands out their tokens."""
        dispatch = self._in_flight.popleft()
        sampled = jax.device_get(dispatch.sampled)
        self._note_pace(dispatch)
        advanced: dict[Sequence, None] = {}
        running = self.scheduler.running
        for row, (sequence, place) in dispatch.places.items():
            for step in range(dispatch.num_steps):
                if running.get(row) is not sequence:
                    break  # it has ended, or left for another reason
                if place + step < len(sequence.token_ids):
                    continue  # replayed: known from before a preemption
                of_step = jax.tree.map(lambda x, step=step: x[step], sampled)
                self._append(sequence, of_step, row)
                advanced[sequence] = None
                if sequence.finish_reason:
                    self._leave(row)
        self._in_flight = deque(d for d in self._in_flight if d.has_readers(running))
        return advanced

    def _note_pace(self, dispatch: _Dispatch) -> None:
        """Tells the pacer how long the steps that have just been read had the devices."""
        before, self._last_read = self._last_read, time.monotonic()
        if dispatch.start is None:
            return
        seconds = self._last_read - max(dispatch.start, before)
        if dispatch.prefill_work:
            self._pacer.prefilled(dispatch.prefill_work, dispatch.num_steps, seconds)
        else:
            self._pacer.decoded(dispatch.num_steps, seconds)

    def _start_over(self) -> None:
        """Puts all that ran before the others that wait, and takes a fresh cache.

        What a failed step had taken, or not handed out, is not to be told: nothing of it is used.
        """
        while self.scheduler.running:
            self.scheduler.wait_first(self.scheduler.stop(self.scheduler.newest()))
        if self.scheduler.waiting:
            self.scheduler.waiting[0].prefill = None
        self._prefill_work = 0.0
        self._in_flight.clear()
        self._sampling = None
        self.engine.reset()

    def _rows(self) -> DecodeInputs:
        """The batch's next inputs, idle rows included."""
        batch = self.engine.batch_bucket(self.scheduler.num_rows)
        running = self.scheduler.running
        positions, place = np.zeros((2, batch), np.int32)
        for row, sequence in running.items():
            positions[row] = sequence.position
            place[row] = sequence.num_cached + 1
        sampling = self._sampling
        if sampling is None:
            options = [
                (running[row].params, running[row].seed) if row in running else _IDLE_ROW
                for row in range(batch)
            ]
            sampling = self._sampling = self.engine.on_all_devices(self._stack(options))
        positions, place = self.engine.on_all_devices((positions, place))
        return DecodeInputs(positions, place, sampling, self._allowed(batch))

    def _stack(self, options: list[tuple[SamplingParams, int]]) -> SamplingState:
        vocab_size = self.model_config.vocab_size
        return SamplingState.stack(options, vocab_size, self.tokenizer.eos_token_ids)

    def _allowed(self, batch: int) -> jax.Array:
        """The masks of a batch's guided rows, if there are any."""
        shape = (batch, mask_words(self.model_config.vocab_size))
        if batch not in self._unguided:
            self._unguided[batch] = self.engine.on_all_devices(np.zeros(shape, np.uint32))
        matchers = {row: each.matcher for row, each in self.scheduler.running.items()}
        if not any(matchers.values()):
            return self._unguided[batch]
        allowed = np.zeros(shape, np.uint32)
        for row, matcher in matchers.items():
            if matcher is not None:
                allowed[row] = matcher.allowed()
        return self.engine.on_all_devices(allowed)

    def _leave(self, row: int) -> Sequence:
        """Takes a sequence off its row and frees its pages."""
        self.engine.release(row)
        self._sampling = None
        return self.scheduler.stop(row)

    def _append(self, sequence: Sequence, sampled: Sampled, index: int) -> None:
        """Gives a sequence the token at `index` of one step."""
        token_id = int(sampled.tokens[index])
        count = sequence.params.logprobs
        sequence.append(token_id, None if count is None else self._ranked(sampled, index, count))
        if sequence.finish_reason == "error":
            name = sequence.request.request_id
            log.warning("request %s ends early: its grammar takes more work than is granted", name)

    def _ranked(self, sampled: Sampled, index: int, count: int) -> dict[int, Logprob]:
        """The token at `index`, and as many of the likeliest in its place."""
        chosen = float(sampled.logprob[index]), int(sampled.rank[index])
        ranked = {int(sampled.tokens[index]): chosen}
        for place in range(count):
            likely = int(sampled.top_tokens[index, place])
            ranked.setdefault(likely, (float(sampled.top_logprobs[index, place]), place + 1))
        text = self.tokenizer.token_text
        return {t: Logprob(value, rank, text(t)) for t, (value, rank) in ranked.items()}
