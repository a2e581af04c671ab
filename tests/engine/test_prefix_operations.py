"""Random operations on an engine whose prefixes, turns and choices share a tight cache."""

from pathlib import Path

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.request import Boundary, Request
from tests.engine.drive import (
    check_idle,
    check_owners,
    check_references,
    greedy,
    random_prompt,
    run,
    tiny_cache_bytes,
)

LENGTH = 128
DOCUMENTS = [random_prompt(20 + 15 * i, seed=i) for i in range(3)]
PROMPTS = [random_prompt(10 + 9 * i, seed=10 + i) for i in range(8)]
NUM_PAGES = 3 * 2 * LENGTH // 16 + 30
"""Pages for one request of full length and a few more, so that documents and rows compete."""


class Operations:
    """Draws operations, and compares every answer with the first one to the same request."""

    def __init__(self, llm: LLM, seed: int):
        self.llm, self.engine, self.rng = llm, llm.engine, np.random.default_rng(seed)
        self.asked: dict[str, str] = {}
        """What the unfinished requests ask, by their ids."""
        self.answers: dict[str, list[int]] = {}
        self.count = self.num_finished = 0

    def any(self) -> None:
        """Does something, mostly a step."""
        names = ["add", "ask", "choose", "cancel", "evict", "delete", "reset"]
        weights = np.array([2, 4, 1, 1, 1, 0.5, 0.2])
        if self.rng.random() < 0.5 and self.engine.has_unfinished_requests():
            self.step()
        else:
            getattr(self, self.rng.choice(names, p=weights / weights.sum()))()
        check_references(self.engine.scheduler)

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.num_finished += 1
                asked, tokens = self.asked.pop(output.request_id), output.outputs[0].token_ids
                assert self.answers.setdefault(asked, tokens) == tokens
        check_owners(self.engine)

    def add(self) -> None:
        """Names a document."""
        index = int(self.rng.integers(len(DOCUMENTS)))
        options = {"kv_policy": "streaming_llm", "kv_budget": 12} if index else {}
        self._submit("document", DOCUMENTS[index], 0, caches_prefix=True, **options)

    def ask(self) -> None:
        """Asks about a document, or goes on with a conversation."""
        index = int(self.rng.integers(len(PROMPTS)))
        prompt = PROMPTS[index]
        if index % 2 and (named := self.engine.prefixes.of_owner()):
            prefix = named[int(self.rng.integers(len(named)))].id
            self._submit(f"{prefix} {index}", prompt[:9], 12, prefix_id=prefix)
            return
        boundaries = tuple(Boundary(stop) for stop in range(10, len(prompt), 20))
        self._submit(f"{index}", prompt, 12, boundaries=boundaries, may_continue=True)

    def choose(self) -> None:
        """Asks for three answers at once."""
        index, group = int(self.rng.integers(len(PROMPTS))), f"group {self.count}"
        for _ in range(3):
            self._submit(f"choice {index}", PROMPTS[index], 12, same_prompt=group)

    def cancel(self) -> None:
        if self.asked:
            name = self.rng.choice(sorted(self.asked))
            self.engine.abort_request(name)
            del self.asked[name]

    def evict(self) -> None:
        """Also what requests use: they go on, or compute it again."""
        self.engine.scheduler.prefixes.evict_any()

    def delete(self) -> None:
        """Deletes a prefix, perhaps while requests use it."""
        if named := self.engine.prefixes.of_owner():
            self.engine.delete_prefix(named[int(self.rng.integers(len(named)))].id)

    def reset(self) -> None:
        """Loses the cache, as after a step that has failed."""
        self.engine._reset()

    def _submit(self, asked: str, prompt: list[int], max_tokens: int, **options) -> None:
        name = str(self.count)
        self.count += 1
        self.engine.add_request(Request(name, prompt, greedy(max_tokens), **options))
        self.asked[name] = asked


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_nothing_leaks_and_nothing_compiles(tiny_checkpoint: Path, count: int):
    llm = LLM(
        model=tiny_checkpoint,
        max_model_len=LENGTH,
        max_num_seqs=4,
        prefill_chunk_size=16,
        kv_cache_memory_bytes=tiny_cache_bytes(NUM_PAGES, 4, LENGTH),
        enable_prefix_caching=True,
        prefix_cache_fraction=1.0,
        prefix_min_tokens=8,
        progress=False,
    )
    engine = llm.engine
    lengths = range(1, LENGTH)
    engine.warm_up(lengths, 4, suffix_lengths=lengths, prompt_logprobs=False, forks=True)
    compiled = engine.stats().compilations
    operations = Operations(llm, seed=count)
    for _ in range(count):
        operations.any()
    operations.reset()  # which few operations are
    while engine.has_unfinished_requests():
        operations.step()
    assert operations.num_finished > count / 10
    assert engine.scheduler.num_preemptions > 0
    assert engine.stats().compilations == compiled
    for record in engine.prefixes.of_owner():
        engine.delete_prefix(record.id)
    assert not any(prefix.users for prefix in engine.scheduler.prefixes)
    engine.scheduler.prefixes.clear()
    run(engine)
    check_idle(engine)
