"""What a prefix packs, and where the insert puts it."""

from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.engine import Engine, next_power_of_two, prefill_bucket
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.prefill import kept_tokens
from tests.engine.drive import random_prompt
from tests.oracle.forward import Forward, forward, read_llama

PROMPT = 100


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    """Two devices; head 0 has a copy on both in layer 0, head 2 in layer 1."""
    tokens = ((90.0, 30.0, 20.0), (10.0, 25.0, 80.0))
    profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
    return Engine(
        open_checkpoint(tiny_checkpoint),
        make_plan(profile, 2, "fair_copying", max_extra_replicas=1),
        EngineConfig(tensor_parallel_size=2, max_model_len=256, max_num_seqs=2),
        KVConfig("ada_snapkv", budget=50, window=16),
        progress=False,
    )


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path) -> Forward:
    return forward(read_llama(tiny_checkpoint), random_prompt(PROMPT))


def test_every_replica_packs_its_head(engine: Engine, dense: Forward):
    """Keys of the kept positions slot after slot, in both copies of a head."""
    layout = engine.layout
    assert (layout.replicas.sum(2) == 2).any()
    prefix = engine.prefill(random_prompt(PROMPT))
    kept = kept_tokens(prefix, layout, positions=True)
    assert kept.positions is not None
    packed = np.asarray(prefix.k).reshape(2, 2, -1, 16)
    for layer, heads in enumerate(layout.head_of_slot.reshape(2, 2, -1)):
        for device, slots in enumerate(heads):
            at = 0
            for head in slots[slots >= 0]:
                positions = kept.positions[layer][head]
                keys = packed[layer, device, at : at + len(positions)]
                np.testing.assert_allclose(keys, dense.k[layer][head, positions], atol=1e-4)
                at += len(positions)


def test_inserted_keys_lie_in_the_owners_pages(engine: Engine, dense: Forward):
    """And nothing else of the pool changes."""
    prefix = engine.prefill(random_prompt(PROMPT))
    kept = kept_tokens(prefix, engine.layout, positions=True)
    assert kept.positions is not None
    placement = engine.place(prefix)
    assert not placement.missing_pages.any()
    engine.insert(prefix, 1, placement, random_prompt(PROMPT))
    book, cache = engine.book, engine.cache
    pages = np.asarray(cache.k_pages).reshape(2, book.pages_per_device, book.page_size, 16)
    written = np.zeros(pages.shape[:3], bool)
    for layer, slot in np.argwhere(placement.lengths > 0):
        head, device = (
            engine.layout.head_of_slot[layer, slot],
            slot // engine.layout.slots_per_device,
        )
        positions = kept.positions[layer][head]
        token = np.arange(int(placement.lengths[layer, slot]))
        where = book.page_table[layer, 1, slot][token // book.page_size], token % book.page_size
        got = pages[device][where]
        np.testing.assert_allclose(got, dense.k[layer][head, positions], atol=1e-4)
        written[device][where] = True
    assert np.abs(pages[written]).sum(-1).all()
    assert not pages[~written].any()
    engine.release(1)
    assert not book.used_pages.any()


def test_placement_counts_the_next_steps_pages(engine: Engine):
    """A row that just fits but could not take its next token is not placed."""
    prefix = engine.prefill(random_prompt(32))  # kept whole: two full pages in every slot
    needed = engine.book.pages_for(engine.place(prefix).lengths)
    book = engine.book
    free = book.free_pages
    assert not engine.place(prefix).missing_pages.any()
    book._num_free[:] = needed
    try:
        missing = engine.place(prefix).missing_pages
    finally:
        book._num_free[:] = free
    np.testing.assert_array_equal(missing, needed // 2)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (129, 200), (200, 200)]
)
def test_buckets(tokens: int, bucket: int):
    assert prefill_bucket(tokens, 200) == bucket


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
