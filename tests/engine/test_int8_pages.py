"""Keys and values in int8: the tokens are NumPy's with rounded keys, whatever happens to rows."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.llm_engine import LLMEngine
from fairkv_jax.engine.request import RequestOutput
from fairkv_jax.kv_cache_spec import token_bytes
from tests.engine import compressed
from tests.engine.drive import (
    check_idle,
    check_owners,
    greedy,
    random_prompt,
    request,
    run,
    tiny_cache_bytes,
)
from tests.engine.test_prefixes import check_only_prefixes_left, make_llm
from tests.oracle.forward import read_llama
from tests.pallas.oracle import quantize

NUM_TOKENS = 30
DOCUMENT = random_prompt(150, seed=1)
QUESTIONS = [random_prompt(5 + 4 * i, seed=20 + i) for i in range(4)]
OPTIONS: dict[str, Any] = {
    "kv_cache_dtype": "int8",
    "kv_policy": "ada_snapkv",
    "kv_budget": 80,
    "kv_window": 16,
    "enable_prefix_caching": False,
}
LENGTHS = {"long": 128, "other": 120, "short": 70}  # the last is below the budget
MAX_TOKENS = 110


def run_all(engine: LLMEngine) -> dict[str, RequestOutput]:
    return run(
        engine,
        [
            request(name, random_prompt(n), greedy(MAX_TOKENS), return_kept_positions=True)
            for name, n in LENGTHS.items()
        ],
        check_owners,
    )


def tokens_of(outputs: dict[str, RequestOutput]) -> dict[str, list[int]]:
    return {name: output.outputs[0].token_ids for name, output in outputs.items()}


def rounded(x: np.ndarray) -> np.ndarray:
    values, scales = quantize(x)
    return values * scales.astype(np.float32)[..., None]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[str, RequestOutput]:
    """On one device, with room for all."""
    llm = make_llm(tiny_checkpoint, 1, **OPTIONS)
    outputs = run_all(llm.engine)
    assert llm.engine.scheduler.num_preemptions == 0
    check_idle(llm.engine)
    return outputs


def test_tokens_are_those_of_numpy(tiny_checkpoint: Path, expected: dict[str, RequestOutput]):
    """With rounded keys and values from the first prompt token on; without, they would differ."""
    model = read_llama(tiny_checkpoint)
    differs = False
    for name, length in LENGTHS.items():
        kept = expected[name].kept_positions
        assert kept is not None
        args = model, random_prompt(length), [(length, kept)], NUM_TOKENS
        tokens, _ = compressed.generate(*args, rounded)
        assert expected[name].outputs[0].token_ids[:NUM_TOKENS] == tokens
        differs |= compressed.generate(*args)[0] != tokens
    assert differs


@pytest.mark.parametrize("num_devices", [3, pytest.param(8, marks=pytest.mark.long)])
def test_the_number_of_devices_changes_no_token(
    tiny_checkpoint: Path, expected: dict[str, RequestOutput], num_devices: int
):
    llm = make_llm(tiny_checkpoint, num_devices, **OPTIONS)
    assert tokens_of(run_all(llm.engine)) == tokens_of(expected)
    check_idle(llm.engine)


def test_preemption_changes_no_token(tiny_checkpoint: Path, expected: dict[str, RequestOutput]):
    """The pool holds one request of full length: of several the newer must give way."""
    num_bytes = tiny_cache_bytes(6 * 16, 4, 256, "int8")
    llm = make_llm(tiny_checkpoint, 1, **OPTIONS, kv_cache_memory_bytes=num_bytes)
    assert tokens_of(run_all(llm.engine)) == tokens_of(expected)
    assert llm.engine.scheduler.num_preemptions > 0
    check_idle(llm.engine)


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path) -> LLM:
    """Three devices, with replicas of heads, and prefixes."""
    return make_llm(tiny_checkpoint, 3, kv_cache_dtype="int8")


def test_a_prefix_kept_whole_changes_no_token(shared: LLM):
    """What a token finds in the cache is what it would find beside itself."""
    whole = shared.generate([[*DOCUMENT, *question] for question in QUESTIONS], greedy(NUM_TOKENS))
    prefix = shared.cache_prefix(DOCUMENT)
    outputs = shared.generate(QUESTIONS, greedy(NUM_TOKENS), prefix_id=prefix.id)
    tokens = [[output.outputs[0].token_ids for output in each] for each in (whole, outputs)]
    assert tokens[0] == tokens[1]
    assert {output.num_cached_tokens for output in outputs} == {len(DOCUMENT)}
    shared.delete_prefix(prefix.id)
    check_idle(shared.engine)


def test_a_compressed_prefix_may_be_cached_or_not(shared: LLM):
    """Rows copy its last page, which is not full, with its scales."""
    options = {"kv_policy": "streaming_llm", "kv_budget": 40}
    apart = []
    for question in QUESTIONS:
        prefix = shared.cache_prefix(DOCUMENT, **options)
        apart += shared.generate([question], greedy(NUM_TOKENS), prefix_id=prefix.id)
        shared.delete_prefix(prefix.id)
        check_idle(shared.engine)
    prefix = shared.cache_prefix(DOCUMENT, **options)
    together = shared.generate(QUESTIONS, greedy(NUM_TOKENS), prefix_id=prefix.id)
    tokens = [[output.outputs[0].token_ids for output in each] for each in (apart, together)]
    assert tokens[0] == tokens[1]
    check_only_prefixes_left(shared)
    spec = shared.engine.runner.cache_spec
    num_pages = prefix.kept_tokens.size * -(-40 // spec.page_size)
    assert prefix.bytes == num_pages * spec.page_size * 2 * (spec.head_dim + 2)
    shared.delete_prefix(prefix.id)


def test_pages_hold_the_rounded_keys_and_values(tiny_checkpoint: Path):
    """In the first layer, whose keys do not depend on rounded ones."""
    pools = {}
    for dtype in ("auto", "int8"):
        llm = make_llm(tiny_checkpoint, 1, kv_cache_dtype=dtype)
        llm.engine.add_request(request("a", DOCUMENT, greedy(3)))
        while not llm.engine.scheduler.running:
            llm.engine.step()
        manager, page_size = llm.engine.scheduler.kv_cache, llm.engine.runner.cache_spec.page_size
        token = np.arange(len(DOCUMENT))
        slots = [where for where in np.argwhere(manager.lengths > 0) if where[0] == 0]
        pages = np.stack([manager.pages_of(*where)[token // page_size] for where in slots])
        leaves = jax.tree.leaves(llm.engine.runner.cache.pool)
        pools[dtype] = [np.asarray(leaf)[pages, token % page_size] for leaf in leaves]
        run(llm.engine)
    assert [leaf.dtype.name for leaf in pools["int8"]] == ["int8"] * 2 + ["bfloat16"] * 2
    for floats, values, scales in zip(
        pools["auto"], pools["int8"][:2], pools["int8"][2:], strict=True
    ):
        assert floats.shape == (3, len(DOCUMENT), 16)
        its_values, its_scales = quantize(floats)
        np.testing.assert_array_equal(scales, its_scales)
        np.testing.assert_array_equal(values, its_values)


@pytest.mark.parametrize(("head_dim", "num_bytes"), [(64, 132), (128, 260)])
def test_a_cached_token_takes_a_byte_per_element_and_two_scales(head_dim: int, num_bytes: int):
    assert token_bytes(head_dim, "int8") == num_bytes
    assert token_bytes(head_dim, "bfloat16") == 4 * head_dim


def test_the_same_memory_holds_more_pages(tiny_checkpoint: Path):
    """As many as its arrays leave room for; a page's bytes are those of the arrays."""
    options: dict[str, Any] = {
        "kv_cache_memory_bytes": tiny_cache_bytes(6 * 16, 4, 256),
        "enable_prefix_caching": False,
    }
    pages = {}
    for dtype in ("auto", "int8"):
        runner = make_llm(tiny_checkpoint, 1, kv_cache_dtype=dtype, **options).engine.runner
        spec, leaves = runner.cache_spec, jax.tree.leaves(runner.cache.pool)
        pages[dtype] = spec.pages_per_device
        assert sum(leaf.nbytes for leaf in leaves) == spec.pool_bytes_per_device
        assert spec.bytes_per_device <= options["kv_cache_memory_bytes"]
    assert pages["int8"] > 2.5 * pages["auto"]


def test_an_unknown_type_is_refused(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, int8, got 'fp8'"):
        make_llm(tiny_checkpoint, 1, kv_cache_dtype="fp8")
