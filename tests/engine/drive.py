"""Runs an engine step by step, and looks into its books while it does."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.sampling_params import SamplingParams

TINY_VOCAB = 384


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random ids of the tiny vocabulary, control tokens left out."""
    rng = np.random.default_rng([seed, num_tokens])
    return rng.integers(3, TINY_VOCAB, num_tokens).tolist()


def greedy(max_tokens: int, **options) -> SamplingParams:
    """Greedy decoding of exactly that many tokens."""
    return SamplingParams(**{"temperature": 0, "ignore_eos": True} | options, max_tokens=max_tokens)


def request(name: str, prompt: Sequence[int], params: SamplingParams, **options) -> Request:
    return Request(name, list(prompt), params, **options)


def run(
    engine: LLMEngine,
    requests: Iterable[Request] = (),
    after_step: Callable[[LLMEngine], None] = lambda engine: None,
) -> dict[str, RequestOutput]:
    """Adds the requests, steps until nothing is left, and returns the finished outputs."""
    for each in requests:
        engine.add_request(each)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {out.request_id: out for out in engine.step() if out.finished}
        after_step(engine)
    return finished


def check_owners(engine: LLMEngine) -> None:
    """Every (layer, head, row) has one owner with the right length, on the devices too."""
    book, layout, cache = engine.engine.book, engine.engine.layout, engine.engine.cache
    lengths, table = np.asarray(cache.lengths), np.asarray(cache.page_table)
    np.testing.assert_array_equal(lengths, book.lengths)
    num_cached = 0
    for row in range(lengths.shape[1]):
        sequence = engine.scheduler.running.get(row)
        if sequence is None:
            assert not lengths[:, row].any(), f"nobody sits in row {row}, but it owns tokens"
            continue
        assert sequence.kept is not None
        expected = sequence.kept.lengths + sequence.num_cached
        num_cached += expected.sum()
        for layer, heads in enumerate(layout.head_of_slot):
            for head in range(layout.num_heads):
                of_replicas = lengths[layer, row, heads == head]
                assert np.count_nonzero(of_replicas) == 1
                assert of_replicas.sum() == expected[layer, head]
            assert not lengths[layer, row, heads < 0].any()
    assert lengths.sum() == num_cached
    _check_pages(engine, lengths, table)


def _check_pages(engine: LLMEngine, lengths: np.ndarray, table: np.ndarray) -> None:
    """Book and devices agree on the pages in use, and none of them serves two slots."""
    book = engine.engine.book
    used = np.arange(book.max_pages) < -(-lengths // book.page_size)[..., None]
    np.testing.assert_array_equal(table[used], book.page_table[used])
    device = np.broadcast_to(
        np.arange(lengths.shape[2]) // engine.engine.layout.slots_per_device, lengths.shape
    )[..., None]
    pages = np.stack([np.broadcast_to(device, used.shape)[used], table[used]])
    assert np.unique(pages, axis=1).shape == pages.shape
    np.testing.assert_array_equal(
        np.bincount(pages[0], minlength=book.num_devices), book.used_pages
    )


def check_idle(engine: LLMEngine) -> None:
    """Nothing runs or waits, every page is free, no row owns anything."""
    assert not engine.has_unfinished_requests()
    assert not engine.scheduler.running
    assert not engine.engine.book.used_pages.any()
    assert not engine.engine.book.lengths.any()
    assert not np.asarray(engine.engine.cache.lengths).any()
    assert engine.scheduler.has_free_row
