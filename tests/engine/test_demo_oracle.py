"""The real checkpoint against NumPy: logits of the prefill, and the positions that are kept."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax import LLM
from fairkv_jax.compress.registry import make_method
from fairkv_jax.config import KVConfig
from fairkv_jax.engine.execution import kept_tokens
from fairkv_jax.engine.prefill_runner import PrefillRunner
from fairkv_jax.engine.programs import Programs
from fairkv_jax.plan import Profile, make_plan
from tests.engine.texts import STORY
from tests.oracle.forward import Forward, forward, read_llama
from tests.oracle.selection import Options, kept_positions

LENGTHS = (1, 31, 32, 33, 300, 700)
SHORT_PREFILLS = {(1, 1), (31, 1), (32, 1), (33, 1), (300, 1), (33, 2), (300, 2)}
"""The lengths and numbers of devices of the short form."""
PROMPT = 300
"""Tokens of the prompt whose selections are compared, in a bucket of 512."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def token_ids(demo_llms: Callable[[int], LLM]) -> list[int]:
    ids = demo_llms(1).get_tokenizer().encode(STORY)
    assert len(ids) >= max(LENGTHS)
    return ids


@pytest.fixture(scope="module")
def demo_llms(demo_checkpoint: Path) -> Iterator[Callable[[int], LLM]]:
    """The engine on that many devices, made once."""
    made: dict[int, LLM] = {}

    def get(num_devices: int) -> LLM:
        if num_devices not in made:
            made[num_devices] = LLM(
                model=demo_checkpoint,
                tensor_parallel_size=num_devices,
                head_plan=make_plan(Profile.uniform(30, 3, 128), num_devices),
                kv_policy="ada_snapkv",
                kv_budget=128,
                max_model_len=1024,
                max_num_seqs=1,
                progress=False,
            )
        return made[num_devices]

    yield get
    made.clear()


@pytest.fixture(scope="module")
def oracle(demo_checkpoint: Path, token_ids: list[int]) -> Callable[[int], Forward]:
    """The forward pass over that many tokens, made once."""
    model = read_llama(demo_checkpoint)
    made: dict[int, Forward] = {}

    def get(length: int) -> Forward:
        if length not in made:
            made[length] = forward(model, token_ids[:length])
        return made[length]

    return get


@pytest.mark.parametrize(
    ("length", "num_devices"),
    [
        pytest.param(
            length,
            devices,
            marks=[] if (length, devices) in SHORT_PREFILLS else [pytest.mark.long],
        )
        for length in LENGTHS
        for devices in (1, 2)
    ],
)
def test_prefill_logits(
    demo_llms: Callable[[int], LLM],
    oracle: Callable[[int], Forward],
    token_ids: list[int],
    length: int,
    num_devices: int,
):
    logits = demo_llms(num_devices).prefill_logits(token_ids[:length])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, oracle(length).logits, rtol=0, atol=2e-3)


@dataclass(frozen=True)
class Case:
    """One selection, in the engine's options and in the oracle's."""

    config: KVConfig
    options: Options

    @classmethod
    def of(cls, policy: str, **options) -> "Case":
        return cls(KVConfig(policy=policy, **options), Options(policy, **options))


SHORT = ("full", "snapkv max mean first", "ada_snapkv blend avg pool first")
"""The cases of the short form; the tiny model has all of them in tests/compress."""


def cases() -> dict[str, list[Case]]:
    """Under each name the same policy with a budget and with a ratio."""
    sizes = ({"budget": 96}, {"ratio": 1 - 96 / 512})  # 96 and 56 of 300, by one program
    named = {
        "full": [Case.of("full")],
        "streaming_llm": [Case.of("streaming_llm", **size) for size in sizes],
    }
    safeguards = ({"safeguard": name} for name in ("blend", "reserve"))
    scored = [("snapkv", {}), *(("ada_snapkv", each) for each in safeguards)]
    for (policy, safeguard), pool, first in product(scored, ("max", "avg"), (False, True)):
        order = "pool first" if first else "mean first"
        options = {"pooling": pool, "pool_first": first, **safeguard}
        name = " ".join([policy, *safeguard.values(), pool, order])
        named[name] = [Case.of(policy, **options, **size) for size in sizes]
    return named


@pytest.mark.parametrize(
    "several",
    [
        pytest.param(several, id=name, marks=[] if name in SHORT else [pytest.mark.long])
        for name, several in cases().items()
    ],
)
def test_kept_positions(
    demo_llms: Callable[[int], LLM],
    oracle: Callable[[int], Forward],
    token_ids: list[int],
    several: list[Case],
):
    """Exactly the oracle's, layer by layer and head by head, on two devices with a copied head."""
    engine = demo_llms(2).engine.runner
    assert engine.layout.replicas.all(2).any()
    dense = oracle(PROMPT)
    # An engine of these options on the same weights; its cache is not touched.
    other = copy(engine)
    other.kv_config = several[0].config
    other.methods = (make_method(other.kv_config),)
    other.programs = Programs(
        engine.programs._shapes,
        engine.config,
        other.kv_config,
        other.methods,
        None,
        engine.packing,
        show=False,
    )
    other._prefills = PrefillRunner(
        other.programs,
        other.model,
        other.layout,
        other.config,
        other.kv_config,
        other.methods,
        None,
    )
    for case in several:
        prefix = other.prefill(token_ids[:PROMPT], case.config)
        kept = kept_tokens(prefix, engine.layout, positions=True)
        assert kept.positions is not None
        for layer, (q, k) in enumerate(zip(dense.q, dense.k, strict=True)):
            for head, want in enumerate(kept_positions(q, k, case.options)):
                np.testing.assert_array_equal(
                    kept.positions[layer][head], want, f"{case.options}, {layer=}, {head=}"
                )
                assert kept.lengths[layer, head] == len(want)
