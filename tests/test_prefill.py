"""What a prefix packs, and where the insert puts it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.execution import kept_tokens
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.prefill_chunking import prefill_bucket
from fairkv_jax.engine.scheduler_output import Insertion, NewRequest, PrefillChunks, SchedulerOutput
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.shapes import next_power_of_two
from tests.engine.drive import random_prompt
from tests.oracle.forward import Forward, forward, read_llama

PROMPT = 100


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Path) -> ModelRunner:
    """Two devices; head 0 has a copy on both in layer 0, head 2 in layer 1."""
    tokens = ((90.0, 30.0, 20.0), (10.0, 25.0, 80.0))
    profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
    return ModelRunner(
        open_checkpoint(tiny_checkpoint),
        make_plan(profile, 2, "fair_copying", max_extra_replicas=1),
        EngineConfig(tensor_parallel_size=2, max_model_len=256, max_num_seqs=2),
        KVConfig("ada_snapkv", budget=50, window=16),
        progress=False,
    )


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path) -> Forward:
    return forward(read_llama(tiny_checkpoint), random_prompt(PROMPT))


def test_every_replica_packs_its_head(runner: ModelRunner, dense: Forward):
    """Keys of the kept positions layer by layer, slot after slot, in both copies of a head."""
    layout = runner.layout
    assert (layout.replicas.sum(2) == 2).any()
    prefix = runner.prefill(random_prompt(PROMPT))
    kept = kept_tokens(prefix, layout, positions=True)
    assert kept.positions is not None
    packed = np.asarray(prefix.k).reshape(2, -1, 16)
    at = [0, 0]
    for layer, heads in enumerate(layout.head_of_slot.reshape(2, 2, -1)):
        for device, slots in enumerate(heads):
            for head in slots[slots >= 0]:
                positions = kept.positions[layer][head]
                keys = packed[device, at[device] : at[device] + len(positions)]
                np.testing.assert_allclose(keys, dense.k[layer][head, positions], atol=1e-4)
                at[device] += len(positions)


def test_inserted_keys_lie_in_the_owners_pages(runner: ModelRunner, dense: Forward):
    """And nothing else of the pool changes."""
    prompt, manager = random_prompt(PROMPT), KVCacheManager(runner.cache_spec, runner.layout)
    new = NewRequest("a", prompt, SamplingParams(), 0, return_kept_positions=True)
    chunks = runner.start_prefill(new).shape.num_chunks
    prefill = PrefillChunks("a", 0, chunks, chunks, 1.0, new)
    result = runner.execute(output_of(manager, prefill=prefill)).result().prefill
    assert result is not None
    assert result.kept.positions is not None
    lengths = manager.reserve_prompt(1, result.kept.lengths)
    assert lengths is not None
    insertion = Insertion("a", 1, lengths, [5])
    runner.execute(output_of(manager, insertion=insertion)).result()
    spec, layout = manager.spec, runner.layout
    pages = np.asarray(runner.cache.pool.k_pages).reshape(
        2, spec.pages_per_device, spec.page_size, 16
    )
    written = np.zeros(pages.shape[:3], bool)
    for layer, slot in np.argwhere(lengths > 0):
        head, device = layout.head_of_slot[layer, slot], slot // layout.slots_per_device
        positions = result.kept.positions[layer][head]
        token = np.arange(int(lengths[layer, slot]))
        where = manager.pages_of(layer, 1, slot)[token // spec.page_size], token % spec.page_size
        got = pages[device][where]
        np.testing.assert_allclose(got, dense.k[layer][head, positions], atol=1e-4)
        written[device][where] = True
    assert np.abs(pages[written]).sum(-1).all()
    assert not pages[~written].any()
    np.testing.assert_array_equal(np.asarray(runner.cache.lengths)[:, 1], lengths)
    manager.free(1)
    runner.execute(output_of(manager, released_rows=(1,))).result()
    assert not np.asarray(runner.cache.lengths).any()


def output_of(manager: KVCacheManager, **parts) -> SchedulerOutput:
    """An output with the given parts."""
    fields: dict[str, Any] = dict.fromkeys(("insertion", "prefill", "decode"))
    fields |= {"preempted_request_ids": (), "finished_request_ids": (), "released_rows": ()} | parts
    return SchedulerOutput(0, False, page_table_update=manager.take_page_table_update(), **fields)


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(1, 32), (32, 32), (33, 64), (65, 128), (129, 512), (513, 2048), (2049, 3000), (3000, 3000)],
)
def test_buckets(tokens: int, bucket: int):
    config = EngineConfig(max_model_len=3000, prefill_chunk_size=128)
    assert prefill_bucket(tokens, config) == bucket


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
