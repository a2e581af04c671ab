"""Rows that are compressed again while they decode: what they keep, and what that never changes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import Request
from fairkv_jax.engine.scheduler_output import RowCompression
from fairkv_jax.kv_cache_spec import KVCacheSpec, QueryStore
from fairkv_jax.replay import open_log, replay
from tests.engine.drive import check_idle, greedy, random_prompt, request, run
from tests.engine.logged import SteadyTimer, plan_with_replicas
from tests.oracle import row_compression
from tests.oracle.forward import forward, read_llama
from tests.oracle.selection import Options

BUDGET, INTERVAL, WINDOW, MAX_TOKENS = 144, 16, 8, 512
OPTIONS: dict[str, Any] = {
    "max_model_len": MAX_TOKENS,
    "max_num_seqs": 2,
    "kv_window": WINDOW,
    "kv_decode_budget": BUDGET,
    "kv_decode_interval": INTERVAL,
    "progress": False,
}
LENGTHS = ((100, 150), (40, 170), (130, 60))
"""Tokens of the prompts and outputs of three requests, which share two rows."""


def requests() -> list[Request]:
    return [
        request(str(i), random_prompt(length), greedy(count))
        for i, (length, count) in enumerate(LENGTHS)
    ]


def tokens_of(
    engine: LLMEngine,
    requests: list[Request],
    after_step: Callable[[LLMEngine], None] = lambda engine: None,
) -> list[list[int]]:
    engine._timer = SteadyTimer()
    outputs = run(engine, requests, after_step)
    return [outputs[each.request_id].outputs[0].token_ids for each in requests]


def check_pages(engine: LLMEngine) -> None:
    """The pages in use are those that hold tokens, and as many as tokens need."""
    manager, spec = engine.scheduler.kv_cache, engine.runner.cache_spec
    lengths, num_pages = manager.lengths, np.zeros(spec.num_devices, int)
    for layer, row, slot in np.argwhere(lengths > 0):
        pages = manager.pages_of(layer, row, slot)
        assert len(pages) == -(-lengths[layer, row, slot] // spec.page_size)
        num_pages[slot // spec.slots_per_device] += len(pages)
    if not len(engine.scheduler.prefixes):
        assert num_pages.tolist() == manager.used_pages.tolist()
    running = engine.scheduler.running
    settled = [row for row, each in running.items() if not each.is_being_compressed]
    on_devices = np.asarray(engine.runner.cache.lengths)
    np.testing.assert_array_equal(on_devices[:, settled], lengths[:, settled])
    assert (on_devices[:, list(running)] <= lengths[:, list(running)]).all()


def check_bound(engine: LLMEngine) -> None:
    """No row holds more than the budget and what has been generated since; a half is rounding."""
    lengths = np.asarray(engine.runner.cache.lengths)
    heads = engine.model_config.num_layers * engine.model_config.num_kv_heads
    for row in engine.scheduler.running:
        assert lengths[:, row].sum() / heads <= BUDGET + INTERVAL + 0.5
    check_pages(engine)


@dataclass(frozen=True)
class Row:
    """What the devices hold of a row: keys and values [n, H] by (layer, head), and queries.

    Those of int8 pages are multiplied by their scales.
    """

    heads: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    queries: dict[tuple[int, int], np.ndarray]
    """[G, w, H] of the head's last queries, the oldest first."""


def read_row(engine: LLMEngine, at: RowCompression) -> Row:
    """Reads a row by the tables on the devices."""
    cache, layout, spec = engine.runner.cache, engine.runner.layout, engine.runner.cache_spec
    lengths, starts = np.asarray(cache.lengths), np.asarray(cache.page_table.starts)
    entries = np.asarray(cache.page_table.pages).reshape(spec.num_devices, -1)
    pools = [
        np.array(x).reshape(spec.num_devices, spec.pages_per_device, spec.page_size, -1)
        for x in (cache.pool.k_pages, cache.pool.v_pages)
    ]
    if cache.pool.scales is not None:
        scales = (np.array(x, np.float32) for x in cache.pool.scales)
        pools = [
            x * scale.reshape(*x.shape[:-1], 1) for x, scale in zip(pools, scales, strict=True)
        ]
    stored = None if cache.queries is None else np.array(cache.queries)
    heads, queries = {}, {}
    for layer, slot in np.argwhere(lengths[:, at.row] > 0):
        device, length = slot // spec.slots_per_device, lengths[layer, at.row, slot]
        pages = entries[device, starts[layer, at.row, slot] :][: -(-length // spec.page_size)]
        key = int(layer), int(layout.head_of_slot[layer, slot])
        k, v = (x[device, pages].reshape(-1, x.shape[-1])[:length] for x in pools)
        heads[key] = k, v
        if stored is not None:
            order = (at.position + 1 + np.arange(WINDOW)) % WINDOW
            queries[key] = stored[layer, at.row, order, slot].swapaxes(0, 1)
    return Row(heads, queries)


def recorded(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[RowCompression, Row, Row]]:
    """A list to which every compression is added with what its row holds before and after it."""
    records, compress = [], engine.runner._compress_row

    def compress_and_record(at: RowCompression) -> Any:
        before = read_row(engine, at)
        lengths = compress(at)
        records.append((at, before, read_row(engine, at)))
        return lengths

    monkeypatch.setattr(engine.runner, "_compress_row", compress_and_record)
    return records


def unrotated(q: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """The queries [G, w, H] before RoPE."""
    angles = positions[:, None] * frequencies
    cos, sin = np.cos(angles), -np.sin(angles)
    first, second = np.split(q, 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(q.dtype)


def check_record(
    record: tuple[RowCompression, Row, Row], policy: str, frequencies: np.ndarray
) -> int:
    """Compares what heads keep with the NumPy oracle; returns how many tokens were dropped."""
    at, before, after = record
    dropped, (num_layers, num_heads) = 0, at.budgets.shape
    positions = at.position - WINDOW + 1 + np.arange(WINDOW)
    nothing = np.zeros((2, WINDOW, 16), np.float32)
    for layer in range(num_layers):
        keys = [(layer, head) for head in range(num_heads)]
        queries = [before.queries.get(key, nothing) for key in keys]
        kept = row_compression.kept(
            policy,
            [before.heads[key] for key in keys],
            queries,
            [unrotated(q, positions, frequencies) for q in queries],
            frequencies,
            at.position + 1,
            at.budgets[layer].tolist(),
            at.fixed_lengths[layer].tolist(),
            Options(policy, window=WINDOW),
        )
        for key, index in zip(keys, kept, strict=True):
            for old, new in zip(before.heads[key], after.heads[key], strict=True):
                np.testing.assert_array_equal(new, old[index])
            dropped += len(before.heads[key][0]) - len(index)
    return dropped


@pytest.mark.parametrize(
    ("policy", "num_devices", "dtype"),
    [
        ("keydiff", 1, "auto"),
        ("snapkv", 2, "auto"),
        ("snapkv", 2, "int8"),
        ("ada_snapkv", 3, "auto"),
        ("expected_attention", 2, "auto"),
    ],
)
def test_heads_keep_what_numpy_says(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    num_devices: int,
    dtype: str,
):
    """A row is compressed three times; before the first time, all that NumPy computes is there."""
    llm = LLM(
        model=tiny_checkpoint,
        kv_decode_policy=policy,
        kv_cache_dtype=dtype,
        tensor_parallel_size=num_devices,
        head_plan=plan_with_replicas(num_devices),
        **OPTIONS,
    )
    records = recorded(llm.engine, monkeypatch)
    prompt = random_prompt(100)
    (tokens,) = tokens_of(llm.engine, [request("a", prompt, greedy(82))], check_pages)
    assert [at.position + 1 for at, _, _ in records] == [148, 164, 180]
    model = read_llama(tiny_checkpoint)
    at, before, _ = records[0]
    whole = forward(model, [*prompt, *tokens][: at.position + 1])
    exact = {"auto": 2e-4, "int8": 0.15}[dtype]
    for (layer, head), (k, v) in before.heads.items():
        np.testing.assert_allclose(k, whole.layers[layer].k[head], atol=exact)
        np.testing.assert_allclose(v, whole.layers[layer].v[head], atol=exact)
    for (layer, head), q in before.queries.items():
        expected = whole.layers[layer].q[2 * head : 2 * head + 2, -WINDOW:]
        np.testing.assert_allclose(q, expected, atol=exact)
    assert bool(before.queries) == (policy != "keydiff")
    for record in records:
        assert check_record(record, policy, whole.layers[0].frequencies) >= 6 * 4
    lengths = {len(k) for k, _ in records[-1][2].heads.values()}
    assert (lengths == {BUDGET}) == (policy in ("keydiff", "snapkv"))
    check_idle(llm.engine)


PROMPTS = {"kv_policy": "ada_snapkv", "kv_budget": 80}


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> list[list[int]]:
    """The tokens of one device with all the pages that it may need."""
    llm = LLM(model=tiny_checkpoint, **OPTIONS, **PROMPTS)
    engine = llm.engine
    engine.warm_up([length for length, _ in LENGTHS], 2, prompt_logprobs=False)
    before = engine.stats().compilations
    tokens = tokens_of(engine, requests(), check_bound)
    assert engine.stats().compilations == before
    check_idle(engine)
    return tokens


@pytest.mark.parametrize("num_devices", [2, pytest.param(3, marks=pytest.mark.long)])
def test_any_number_of_devices_gives_the_same_tokens(
    tiny_checkpoint: Path, expected: list[list[int]], num_devices: int
):
    llm = LLM(
        model=tiny_checkpoint,
        tensor_parallel_size=num_devices,
        head_plan=plan_with_replicas(num_devices),
        **OPTIONS,
        **PROMPTS,
    )
    assert tokens_of(llm.engine, requests(), check_bound) == expected
    check_idle(llm.engine)


def test_preemption_and_replay_change_no_token(
    tiny_checkpoint: Path, expected: list[list[int]], tmp_path: Path
):
    """Pages for one request of full length: compressed rows share them until they grow."""
    spec = KVCacheSpec(
        num_layers=2,
        num_rows=2,
        num_devices=1,
        slots_per_device=3,
        head_dim=16,
        page_size=64,
        pages_per_device=6 * MAX_TOKENS // 64,
        max_tokens=MAX_TOKENS,
        queries=QueryStore(WINDOW, 2, "float32"),
    )
    log = tmp_path / "log.jsonl"
    tight = LLM(
        model=tiny_checkpoint,
        page_size=64,
        kv_cache_memory_bytes=spec.bytes_per_device,
        schedule_log=log,
        schedule_log_prompts=True,
        **OPTIONS,
        **PROMPTS,
    )
    engine = tight.engine
    assert engine.runner.cache_spec == spec, "the stored queries are counted"
    taken = sum(x.nbytes for x in (engine.runner.cache.queries,) if x is not None)
    assert taken == spec.query_bytes_per_device
    assert tokens_of(engine, requests(), check_pages) == expected
    assert preempt_in_the_middle(engine) == expected
    check_idle(engine)
    engine.close()
    header, entries = open_log(log)
    assert replay(header, entries).num_tokens > 2 * sum(map(len, expected))


def preempt_in_the_middle(engine: LLMEngine) -> list[list[int]]:
    """Runs the requests; one is preempted twice, after it has been compressed."""
    left = [110, 135]

    def preempt(engine: LLMEngine) -> None:
        scheduler = engine.scheduler
        row = scheduler.row_of("1")
        if left and row is not None and scheduler.running[row].num_cached >= left[0]:
            scheduler._wait(scheduler._release(row))
            left.pop(0)

    tokens = tokens_of(engine, requests(), preempt)
    assert not left, "nothing was preempted"
    return tokens


def test_a_budget_beyond_the_length_changes_nothing(tiny_checkpoint: Path):
    options: dict[str, Any] = OPTIONS | {"kv_decode_budget": MAX_TOKENS}
    several = requests()[:2]
    llm = LLM(model=tiny_checkpoint, **options)
    tokens = tokens_of(llm.engine, several)
    plain = LLM(model=tiny_checkpoint, max_model_len=MAX_TOKENS, max_num_seqs=2, progress=False)
    assert tokens == tokens_of(plain.engine, several)


def test_a_cached_prefix_stays_as_it_is(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows share its pages and drop only what is their own, also after it has been evicted."""
    llm = LLM(
        model=tiny_checkpoint,
        enable_prefix_caching=True,
        kv_policy="keydiff",
        kv_budget=60,
        **OPTIONS,
    )
    engine = llm.engine
    document, questions = random_prompt(100, 7), [random_prompt(9), random_prompt(20)]
    prefix = llm.cache_prefix(document)
    records = recorded(engine, monkeypatch)

    def ask() -> list[list[int]]:
        outputs = llm.generate(questions, greedy(150), prefix_id=prefix.id)
        return [output.outputs[0].token_ids for output in outputs]

    first = ask()
    assert len(records) > 6
    frequencies = 10000.0 ** (-2 * np.arange(8) / 16)
    for at, before, after in records:
        assert (at.fixed_lengths == 60).all()
        assert (at.budgets == 60 + 128).all(), "what is protected does not give way"
        check_record((at, before, after), "keydiff", frequencies)
        for key, (k, _) in before.heads.items():
            np.testing.assert_array_equal(after.heads[key][0][:60], k[:60])
    assert ask() == first
    engine.scheduler.prefixes.clear()
    assert ask() == first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"kv_decode_budget": 100},
            "kv_decode_budget 100 is smaller than the 128 last tokens .* raise it to 128 or more",
        ),
        (
            {"kv_decode_budget": 130, "kv_decode_policy": "expected_attention"},
            "smaller than the 4 first and 128 last tokens .* raise it to 132 or more",
        ),
        (
            {"kv_decode_budget": 300, "kv_window": 200, "kv_policy": "snapkv", "kv_budget": 250},
            "kv_decode_interval 128 is smaller than kv_window 200.*lower kv_window",
        ),
        (
            {"kv_decode_budget": 200, "kv_policy": "tova", "kv_budget": 100},
            "kv_policy 'tova'.*cannot compress what a request generates: give kv_decode_policy",
        ),
        (
            {"kv_decode_budget": 200, "kv_policy": "pyramidkv", "kv_budget": 100},
            "the allocator 'pyramid'.*give kv_decode_policy, one of snapkv",
        ),
        ({"kv_decode_policy": "keydiff"}, "has no effect without kv_decode_budget"),
        (
            {"kv_decode_budget": 200, "kv_decode_policy": "kvzip"},
            "kv_decode_policy must be one of snapkv, ada_snapkv, expected_attention, keydiff",
        ),
        ({"kv_decode_budget": 0}, "kv_decode_budget must be an integer of at least 1"),
        ({"kv_decode_interval": 0}, "kv_decode_interval must be an integer of at least 1"),
    ],
)
def test_bad_options_say_the_way_out(tiny_checkpoint: Path, options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        LLM(model=tiny_checkpoint, progress=False, **options)
