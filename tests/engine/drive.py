"""Runs an engine step by step, and checks its account of the cache while it does."""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

import numpy as np

from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import Request, RequestOutput
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.sampling_params import SamplingParams

TINY_VOCAB = 384


def tiny_cache_bytes(num_pages: int, num_rows: int, max_tokens: int, dtype: str = "float32") -> int:
    """Bytes of the tiny model's KV cache with that many pages, on one device."""
    spec = KVCacheSpec(
        num_layers=2,
        num_rows=num_rows,
        num_devices=1,
        slots_per_device=3,
        head_dim=16,
        page_size=16,
        pages_per_device=num_pages,
        max_tokens=max_tokens,
        dtype=dtype,
    )
    return spec.bytes_per_device


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


def alone(engine: LLMEngine, requests: list[Request]) -> dict[str, tuple[list[int], str]]:
    """Runs the requests one after the other; their token ids and texts."""
    outputs = {}
    for each in requests:
        (output,) = run(engine, [each]).values()
        outputs[each.request_id] = output.outputs[0].token_ids, output.outputs[0].text
    return outputs


def check_owners(engine: LLMEngine) -> None:
    """Every (layer, head, row) has one owner with the right length, on the devices too.

    The devices hold what has been executed: rows that have ended since are released by the next
    output, and their pages may be in use already only after that.
    """
    manager, layout = engine.scheduler.kv_cache, engine.runner.layout
    lengths, on_devices = manager.lengths, np.asarray(engine.runner.cache.lengths)
    running = engine.scheduler.running
    rows = sorted(running)
    shared = {each.shared_row for each in engine.scheduler.waiting}
    np.testing.assert_array_equal(on_devices[:, rows], lengths[:, rows])
    num_cached = 0
    for row in range(lengths.shape[1]):
        if row in shared:
            assert not on_devices[:, row].any(), "its prompt is not complete"
            continue
        if row not in running:
            assert not lengths[:, row].any(), f"nobody occupies row {row}, but it owns tokens"
            continue
        state = engine.output_processor._states[running[row].request_id]
        assert state.kept is not None
        expected = state.kept.lengths + running[row].num_cached
        num_cached += expected.sum()
        for layer, heads in enumerate(layout.head_of_slot):
            for head in range(layout.num_heads):
                of_replicas = lengths[layer, row, heads == head]
                assert np.count_nonzero(of_replicas) == 1
                assert of_replicas.sum() == expected[layer, head]
            assert not lengths[layer, row, heads < 0].any()
    assert lengths[:, rows].sum() == num_cached
    _check_pages(engine, lengths)


def _check_pages(engine: LLMEngine, lengths: np.ndarray) -> None:
    """Host and devices agree on the pages in use.

    What prefixes hold may serve rows as well. Two rows share only full pages of what their prompts
    have in common, also once the prefix is evicted that they have begun with.
    """
    scheduler, table = engine.scheduler, engine.runner.cache.page_table
    manager, starts = scheduler.kv_cache, np.asarray(table.starts)
    spec = manager.spec
    entries = np.asarray(table.pages).reshape(spec.num_devices, -1)
    waiting = {each.shared_row: each for each in scheduler.waiting if each.shared_row is not None}
    requests = scheduler.running | waiting
    places = [place for prefix in scheduler.prefixes for place in prefix.places]
    seen = {pair for each in places for pair in zip(each.devices, each.pages, strict=True)}
    holders: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    """By (device, page): layer, slot, place in the row, and row."""
    for layer, row, slot in np.argwhere(lengths > 0):
        device, start = slot // spec.slots_per_device, starts[layer, row, slot]
        pages = manager.pages_of(layer, row, slot)
        assert len(pages) == -(-lengths[layer, row, slot] // spec.page_size)
        np.testing.assert_array_equal(entries[device, start : start + len(pages)], pages)
        num_prompt = lengths[layer, row, slot] - requests[row].num_cached
        for place, page in enumerate(pages.tolist()):
            seen.add((device, page))
            if (device, page) not in holders:
                holders[device, page] = layer, slot, place, row
                continue
            *where, of_row = holders[device, page]
            assert where == [layer, slot, place]
            assert of_row != row
            prompts = [requests[each].request.prompt_token_ids for each in (of_row, row)]
            same = takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))
            num_common = min(num_prompt, len(list(same)))
            assert num_common >= (place + 1) * spec.page_size
    used = np.bincount([device for device, _ in seen], minlength=spec.num_devices)
    assert used.tolist() == manager.used_pages.tolist()


def check_references(scheduler: Scheduler) -> None:
    """Every page is referred to as often as rows and prefixes hold it, and is free if never."""
    manager = scheduler.kv_cache
    spec, lengths = manager.spec, manager.lengths
    references = np.zeros((spec.num_devices, spec.pages_per_device), int)
    for layer, row, slot in np.argwhere(lengths > 0):
        pages = manager.pages_of(layer, row, slot)
        assert len(pages) == -(-lengths[layer, row, slot] // spec.page_size)
        references[slot // spec.slots_per_device, pages] += 1
    held = np.zeros_like(references)
    for prefix in scheduler.prefixes:
        assert prefix.places
        for place in prefix.places:
            np.add.at(held, (place.devices, place.pages), 1)
    references += held
    np.testing.assert_array_equal(references, manager._pool.references)
    np.testing.assert_array_equal((references > 0).sum(1), manager.used_pages)
    np.testing.assert_array_equal((held > 0).sum(1), scheduler.prefixes.num_pages)


def check_idle(engine: LLMEngine) -> None:
    """Nothing runs or waits, every page is free, no row owns anything."""
    manager = engine.scheduler.kv_cache
    assert not engine.has_unfinished_requests()
    assert not engine.scheduler.running
    assert engine.scheduler.has_free_row
    assert not manager.used_pages.any()
    assert not manager.lengths.any()
