"""Suffixes that are prefilled over a cached prefix, against NumPy and against one whole prefill."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.execution import Execution, PendingPrefill, kept_tokens
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.scheduler_output import (
    Decode,
    DecodeRow,
    Insertion,
    NewRequest,
    PrefillChunks,
    RowPrefix,
    SchedulerOutput,
)
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.prefill_carry import CompressedPrefix
from fairkv_jax.sampling_params import SamplingParams
from tests.engine import compressed
from tests.engine.drive import random_prompt
from tests.oracle.forward import Llama, read_llama

CHUNK = 16
PREFIX = 270
"""More than a block of keys, and no multiple of a page."""
SUFFIXES = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
NUM_TOKENS = 20  # every slot opens a page on its way
COMPRESSED = KVConfig("ada_snapkv", budget=40, window=8)


class Rows:
    """The rows of a model runner and the account of their pages, driven by hand.

    Row 0 holds a prompt of its own, so that heads of the other rows are routed to other replicas.
    """

    def __init__(self, runner: ModelRunner):
        self.runner = runner
        self.manager = KVCacheManager(runner.cache_spec, runner.layout)
        runner.reset()
        self.tokens: dict[int, list[int]] = {}
        """By row: all tokens that it knows, the last of which is not in the cache yet."""
        self.insert(0, random_prompt(PREFIX, seed=1))

    def insert(self, row: int, prompt: list[int]) -> tuple[RowPrefix, compressed.Segment]:
        """Prefills a prompt into a row; returns what the row holds and what was kept."""
        new = NewRequest(str(row), prompt, SamplingParams(temperature=0), 0, None, None, True)
        chunks = self.runner.start_prefill(new).shape.num_chunks
        prefill = PrefillChunks(str(row), 0, chunks, chunks, 1.0, new, samples_token=True)
        result = self._execute(prefill=prefill).result().prefill
        assert result is not None
        assert result.first_token is not None
        assert result.kept.positions is not None
        first = int(result.first_token.tokens[0, 0])
        lengths = self.manager.reserve_prompt(row, result.kept.lengths)
        assert lengths is not None
        self.manager.activate(row)
        self._execute(insertion=Insertion(str(row), row, lengths, [first])).result()
        self.tokens[row] = [*prompt, first]
        return RowPrefix(row, prompt, lengths), (len(prompt), result.kept.positions)

    def append(
        self, prefix: RowPrefix, token_ids: list[int], suffix: CompressedPrefix
    ) -> tuple[RowPrefix, compressed.Segment]:
        """Appends an extension to its row; returns what the row holds then and what was kept."""
        kept = kept_tokens(suffix, self.runner.layout, positions=True)
        assert kept.positions is not None
        lengths = self.manager.reserve_suffix(prefix.row, kept.lengths)
        assert lengths is not None
        self._execute()  # the pages must be in the devices' page tables
        first = int(np.argmax(suffix.logits))
        prefix = self.runner.append(prefix, token_ids, suffix, lengths, [first])
        self.tokens[prefix.row] = [*prefix.token_ids, first]
        on_devices = np.asarray(self.runner.cache.lengths)
        np.testing.assert_array_equal(on_devices, self.manager.lengths)
        known = np.asarray(self.runner.cache.token_ids)[prefix.row, : len(prefix.token_ids) + 1]
        assert known.tolist() == self.tokens[prefix.row]
        return prefix, (len(prefix.token_ids), kept.positions)

    def decode(self, num_tokens: int) -> dict[int, list[int]]:
        """Decodes every row until it has that many new tokens; by row, the new ones."""
        starts = {row: len(tokens) - 1 for row, tokens in self.tokens.items()}
        for step in range(1, num_tokens):
            assert self.manager.reserve(1)
            rows = [
                DecodeRow(row, str(row), len(self.tokens[row]) - 1, step)
                for row in sorted(self.tokens)
            ]
            sampled = self._execute(decode=Decode(tuple(rows), 1, {})).result().sampled
            assert sampled is not None
            for row, tokens in self.tokens.items():
                tokens.append(int(sampled.tokens[0, row]))
                self.manager.commit(row, 1)
        return {row: tokens[starts[row] :] for row, tokens in self.tokens.items()}

    def _execute(self, **parts: Any) -> Execution:
        fields: dict[str, Any] = dict.fromkeys(("insertion", "prefill", "decode"))
        names = ("preempted_request_ids", "finished_request_ids", "released_rows")
        update = self.manager.take_page_table_update()
        fields |= dict.fromkeys(names, ()) | parts
        return self.runner.execute(SchedulerOutput(0, False, page_table_update=update, **fields))


def make_runner(checkpoint: Path, num_devices: int, kv_config: KVConfig) -> ModelRunner:
    """A runner of three rows, with as many replicas of heads as fit."""
    tokens = ((100.0, 30.0, 20.0), (15.0, 25.0, 90.0))
    profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
    config = EngineConfig(
        tensor_parallel_size=num_devices,
        max_model_len=384,
        max_num_seqs=3,
        prefill_chunk_size=CHUNK,
    )
    plan = make_plan(profile, num_devices, "fair_copying")
    assert (plan.num_extra_replicas > 0) == (num_devices > 1)
    return ModelRunner(open_checkpoint(checkpoint), plan, config, kv_config, progress=False)


@pytest.fixture(scope="module", params=[1, 2, 3])
def full(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> ModelRunner:
    return make_runner(tiny_checkpoint, request.param, KVConfig())


@pytest.fixture(scope="module", params=[1, 2, 3])
def compressing(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> ModelRunner:
    return make_runner(tiny_checkpoint, request.param, COMPRESSED)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Llama:
    return read_llama(tiny_checkpoint)


@pytest.mark.parametrize("length", SUFFIXES)
def test_a_whole_prefix_and_its_suffix_are_one_prompt(full: ModelRunner, length: int):
    """Row 1 is extended, row 2 is prefilled in one go; both decode the same tokens side by side."""
    rows = Rows(full)
    prompt = random_prompt(PREFIX + length)
    prefix, _ = rows.insert(1, prompt[:PREFIX])
    check_owners(full, prefix)
    suffix = full.extend(prefix, prompt[PREFIX:])
    np.testing.assert_allclose(suffix.logits, full.prefill(prompt).logits, atol=1e-4)
    _, (end, kept) = rows.append(prefix, prompt[PREFIX:], suffix)
    for head in (head for layer in kept for head in layer):
        np.testing.assert_array_equal(head, np.arange(PREFIX, end))
    rows.insert(2, prompt)
    tokens = rows.decode(NUM_TOKENS)
    assert tokens[1] == tokens[2]
    assert len(set(tokens[1])) > 4


def check_owners(runner: ModelRunner, prefix: RowPrefix) -> None:
    """Some head is served by another replica than its first, where heads have several."""
    layout = runner.layout
    first = np.take_along_axis(prefix.slot_lengths, layout.first_slot, 1)
    assert (first == 0).any() == (layout.num_devices > 1)


@pytest.mark.parametrize("length", SUFFIXES)
def test_a_suffix_sees_what_a_compressed_prefix_kept(
    compressing: ModelRunner, model: Llama, length: int
):
    """Ragged lengths per head; what was dropped is seen by no token of the suffix or after it."""
    rows = Rows(compressing)
    prompt = random_prompt(PREFIX + length)
    prefix, segment = rows.insert(1, prompt[:PREFIX])
    check_owners(compressing, prefix)
    assert len(np.unique(prefix.slot_lengths)) > 3
    suffix = compressing.extend(prefix, prompt[PREFIX:])
    want = compressed.forward(model, prompt, [segment])
    np.testing.assert_allclose(suffix.logits, want, atol=1e-4)
    dense = compressed.forward(model, prompt, [])
    assert np.abs(dense - want).max() > 0.1
    rows.append(prefix, prompt[PREFIX:], suffix)
    tokens = rows.decode(NUM_TOKENS)[1]
    assert tokens == compressed.generate(model, prompt, [segment], NUM_TOKENS)[0]


def test_a_suffix_is_compressed_at_its_own_end(compressing: ModelRunner, model: Llama):
    """The engine's own method keeps ragged lengths; a second suffix sees what it kept."""
    rows = Rows(compressing)
    ends = (PREFIX, PREFIX + 60, PREFIX + 71)
    prompt = random_prompt(ends[-1])
    prefix, first = rows.insert(1, prompt[: ends[0]])
    middle = prompt[ends[0] : ends[1]]
    suffix = compressing.extend(prefix, middle, COMPRESSED)
    np.testing.assert_allclose(
        suffix.logits, compressed.forward(model, prompt[: ends[1]], [first]), atol=1e-4
    )
    prefix, second = rows.append(prefix, middle, suffix)
    lengths = np.asarray(suffix.head_lengths)
    assert COMPRESSED.budget is not None
    np.testing.assert_allclose(lengths.sum(1), 3 * COMPRESSED.budget, atol=3)  # quotas are rounded
    assert len(np.unique(lengths)) > 2
    for positions in (head for layer in second[1] for head in layer):
        assert positions.min() >= ends[0]
        assert positions[-COMPRESSED.window :].tolist() == [*range(ends[1] - 8, ends[1])]
    suffix = compressing.extend(prefix, prompt[ends[1] :])
    want = compressed.forward(model, prompt, [first, second])
    np.testing.assert_allclose(suffix.logits, want, atol=1e-4)
    rows.append(prefix, prompt[ends[1] :], suffix)
    tokens = rows.decode(NUM_TOKENS)[1]
    assert tokens == compressed.generate(model, prompt, [first, second], NUM_TOKENS)[0]


def test_positions_of_a_compressed_suffix(compressing: ModelRunner):
    """StreamingLLM keeps the suffix's first four tokens and its last ones, whatever it scores."""
    rows = Rows(compressing)
    prefix, _ = rows.insert(1, random_prompt(PREFIX))
    suffix = compressing.extend(prefix, random_prompt(60), KVConfig("streaming_llm", budget=20))
    kept = kept_tokens(suffix, compressing.layout, positions=True)
    assert kept.positions is not None
    want = [*range(PREFIX, PREFIX + 4), *range(PREFIX + 44, PREFIX + 60)]
    assert all(head.tolist() == want for layer in kept.positions for head in layer)


def test_a_conversation_goes_on(compressing: ModelRunner, model: Llama):
    """A suffix after generated tokens; the last of them has not been in the cache yet."""
    rows = Rows(compressing)
    prefix, segment = rows.insert(1, random_prompt(PREFIX))
    rows.decode(NUM_TOKENS)
    answered, question = rows.tokens[1], random_prompt(40, seed=2)
    prefix = RowPrefix(1, answered[:-1], rows.manager.lengths[:, 1])
    suffix_ids = [answered[-1], *question]
    suffix = compressing.extend(prefix, suffix_ids)
    prompt = [*answered, *question]
    want = compressed.forward(model, prompt, [segment])
    np.testing.assert_allclose(suffix.logits, want, atol=1e-4)
    rows.append(prefix, suffix_ids, suffix)
    tokens = rows.decode(NUM_TOKENS)[1]
    assert tokens == compressed.generate(model, prompt, [segment], NUM_TOKENS)[0]


@pytest.mark.parametrize("cuts", [(1, 3, 7), (4,)])
def test_a_suffix_in_parts_is_the_whole(full: ModelRunner, cuts: Sequence[int]):
    """Its log-probabilities are those that the whole prompt gives its tokens."""
    rows = Rows(full)
    prompt = random_prompt(PREFIX + SUFFIXES[-1])
    params = SamplingParams(prompt_logprobs=0)
    prefix, _ = rows.insert(1, prompt[:PREFIX])
    whole = full.extend(prefix, prompt[PREFIX:])
    task = full.start_prefill(NewRequest("", prompt[PREFIX:], params, 0), cached_prefix=prefix)
    assert task.shape.num_layer_chunks == 8
    for start, stop in zip((0, *cuts), (*cuts, task.shape.num_chunks), strict=True):
        full.run_chunks(task, start, stop)
    np.testing.assert_array_equal(task.prefix.logits, whole.logits)
    np.testing.assert_array_equal(task.prefix.k, whole.k)
    one_go = full.start_prefill(NewRequest("", prompt, params, 0))
    full.run_chunks(one_go, 0, one_go.shape.num_chunks)
    results = [PendingPrefill.of(each, full.layout).result() for each in (task, one_go)]
    scores = [each.prompt_logprobs for each in results]
    assert scores[0] is not None
    assert scores[1] is not None
    got, want = scores[0].logprob[:, 0], scores[1].logprob[:, 0]
    np.testing.assert_allclose(got, want[PREFIX:], atol=1e-4)


def test_a_suffix_beyond_the_models_length(full: ModelRunner):
    rows = Rows(full)
    prefix, _ = rows.insert(1, random_prompt(PREFIX))
    message = "prefix of 270 and a suffix of 115 tokens exceed max_model_len 384"
    with pytest.raises(ValueError, match=message):
        full.extend(prefix, random_prompt(115))
