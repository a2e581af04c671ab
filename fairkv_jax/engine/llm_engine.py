"""Requests in, tokens out: continuous batching over the engine's three verbs."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.decode import Rows
from fairkv_jax.engine.engine import Engine
from fairkv_jax.engine.request import Logprob, Request, RequestOutput
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.engine.sequence import Sequence
from fairkv_jax.engine.stats import EngineStats
from fairkv_jax.plan import Plan
from fairkv_jax.prefill import kept_tokens
from fairkv_jax.sampling import Sampled, SamplingState
from fairkv_jax.sampling_params import SamplingParams

_IDLE_ROW = (SamplingParams(temperature=0), 0)


class LLMEngine:
    """Serves requests that come and go at any step; one thread calls it.

    Every step admits what waits and fits, then generates a token for every running request. When
    pages run out, the newest request is preempted: its prompt is prefilled again later and its
    generated tokens are replayed, so that its output does not change.
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
        self._arrivals = itertools.count()
        self._num_preemptions = 0
        self._seeds = np.random.default_rng(engine_config.seed)
        self._sampling: SamplingState | None = None
        """The rows' options on the devices; None when the rows have changed."""

    @property
    def kv_capacity_tokens(self) -> int:
        return self.engine.kv_capacity_tokens

    def warm_up(self, prompt_lengths: Iterable[int], num_requests: int) -> None:
        """Compiles all that requests of these prompt lengths run, with a progress bar."""
        rows = min(num_requests, self.engine_config.max_num_seqs)
        self.engine.warm_up(prompt_lengths, rows)

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
            compilations=self.engine.num_programs,
        )

    def has_unfinished_requests(self) -> bool:
        return len(self.scheduler) > 0

    def validate(self, request: Request) -> None:
        """Checks a request against the model's limits.

        Raises:
            ValueError: the prompt is empty, too long, or holds ids that are not in the vocabulary.
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

    def add_request(self, request: Request) -> None:
        """Puts a request into the queue.

        Raises:
            ValueError: see `validate`; or a request of that id is there already.
        """
        self.validate(request)
        if self.scheduler.has(request.request_id):
            raise ValueError(f"a request with the id {request.request_id!r} is still running")
        params = request.sampling_params
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
        """
        try:
            advanced = self._admit()
            self._make_room()
            advanced |= self._generate()
        except BaseException:
            if self.engine.is_lost:
                self._start_over()
            raise
        return [sequence.output() for sequence in advanced]

    def _admit(self) -> dict[Sequence, None]:
        """Starts the oldest waiting request if there is a row and room for it."""
        scheduler = self.scheduler
        if not scheduler.waiting or not scheduler.has_free_row:
            return {}
        sequence = scheduler.waiting[0]
        sequence.scheduled()
        prefix = sequence.prefix or self.engine.prefill(sequence.request.prompt_token_ids)
        placement = self.engine.place(prefix, len(sequence.token_ids))
        if placement.missing_pages.any():
            sequence.prefix = prefix  # it waits for pages
            return {}
        sequence.prefix = None
        row = scheduler.start()
        self.engine.insert(prefix, row, placement)
        self._sampling = None
        wants_positions = sequence.request.return_kept_positions
        sequence.kept = kept_tokens(prefix, self.engine.layout, positions=wants_positions)
        sequence.num_cached = 0
        if sequence.token_ids:  # preempted before: its first token is known
            return {}
        options = [(sequence.params, sequence.seed)]
        sampling = SamplingState.stack(options, self.model_config.vocab_size)
        self._append(row, jax.device_get(self.engine.sample_first(prefix, sampling)), 0)
        return {sequence: None}

    def _make_room(self) -> None:
        """Preempts the newest requests until every running one has pages for its next token."""
        while self.engine.book.missing_pages().any():
            self.scheduler.wait_first(self._leave(self.scheduler.newest()))
            self._num_preemptions += 1

    def _generate(self) -> dict[Sequence, None]:
        """One decode step for all running requests."""
        running = self.scheduler.running
        if not running:
            return {}
        sampled = jax.device_get(self.engine.generate(self._rows()))
        advanced: dict[Sequence, None] = {}
        for row, sequence in list(running.items()):
            is_replay = sequence.is_replaying
            sequence.num_cached += 1
            if not is_replay:
                self._append(row, sampled, row)
                advanced[sequence] = None
        return advanced

    def _start_over(self) -> None:
        """Puts all that ran before the others that wait, and takes a fresh cache."""
        while self.scheduler.running:
            self.scheduler.wait_first(self.scheduler.stop(self.scheduler.newest()))
        self._sampling = None
        self.engine.reset()

    def _rows(self) -> Rows:
        """The batch's next inputs, idle rows included."""
        batch = self.engine.batch_bucket(self.scheduler.num_rows)
        running = self.scheduler.running
        tokens, positions, place = np.zeros((3, batch), np.int32)
        for row, sequence in running.items():
            tokens[row], positions[row] = sequence.next_input
            place[row] = sequence.num_cached + 1
        if self._sampling is None:
            options = [
                (running[row].params, running[row].seed) if row in running else _IDLE_ROW
                for row in range(batch)
            ]
            self._sampling = SamplingState.stack(options, self.model_config.vocab_size)
        inputs = map(jnp.asarray, (tokens, positions, place))
        return Rows(*inputs, sampling=self._sampling)

    def _leave(self, row: int) -> Sequence:
        """Takes a sequence off its row and frees its pages."""
        self.engine.release(row)
        self._sampling = None
        return self.scheduler.stop(row)

    def _append(self, row: int, sampled: Sampled, index: int) -> None:
        """Gives a running sequence the token at `index`; it leaves its row where that ends it."""
        sequence = self.scheduler.running[row]
        token_id = int(sampled.tokens[index])
        sequence.append(token_id, self._logprobs(sequence, sampled, index))
        if sequence.finish_reason:
            self._leave(row)

    def _logprobs(
        self, sequence: Sequence, sampled: Sampled, index: int
    ) -> dict[int, Logprob] | None:
        """The chosen token and as many of the likeliest as the request wants."""
        count = sequence.params.logprobs
        if count is None:
            return None
        chosen = float(sampled.logprob[index]), int(sampled.rank[index])
        ranked = {int(sampled.tokens[index]): chosen}
        for place in range(count):
            likely = int(sampled.top_tokens[index, place])
            ranked.setdefault(likely, (float(sampled.top_logprobs[index, place]), place + 1))
        text = self.tokenizer.token_text
        return {t: Logprob(value, rank, text(t)) for t, (value, rank) in ranked.items()}
