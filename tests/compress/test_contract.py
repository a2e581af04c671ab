"""What the prefill hands to a method's scorer and allocator, with a method that records it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.compress.allocators import Uniform
from fairkv_jax.compress.budgets import MaxKept
from fairkv_jax.compress.contract import Chunk, LayerShape, Method, Scores, Stats
from fairkv_jax.compress.registry import make_method
from fairkv_jax.compress_layer import compress_layer
from fairkv_jax.config import KVConfig
from fairkv_jax.engine.execution import kept_tokens
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.prefill import run_chunks, split_at_layers
from fairkv_jax.prefill_carry import PrefillCarry, start_prefill
from fairkv_jax.select import keep_top
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.slots import SlotLayout
from tests.engine.drive import random_prompt
from tests.oracle.forward import Forward, forward, read_llama, rms_norm

LENGTH, CHUNK, BUDGET = 100, 32, 20
PROMPT = random_prompt(LENGTH)
MAX_KEPT = MaxKept(in_all_layers=2 * 3 * LENGTH, in_one_layer=3 * LENGTH)


@dataclass(frozen=True)
class Recorder:
    """Records every field of its chunks, and ranks tokens by the largest entry of their keys."""

    hidden_size: int
    num_sinks: int = 0
    window: int = 0

    def init(self, shape: LayerShape) -> Stats:
        slots, tokens, group = shape.num_slots, shape.num_tokens, shape.group_size
        zeros = {
            "x": jnp.zeros((slots, tokens, self.hidden_size)),
            "w_o": jnp.zeros((slots, group, shape.head_dim, self.hidden_size)),
            "num_chunks": jnp.zeros(slots, jnp.int32),
            "length": jnp.zeros(slots, jnp.int32),
        }
        zeros |= {n: jnp.zeros((slots, tokens, group, shape.head_dim)) for n in QUERIES}
        zeros |= {n: jnp.zeros((slots, tokens, shape.head_dim)) for n in ("k", "v")}
        return zeros

    def observe(self, stats: Stats, chunk: Chunk) -> Stats:
        slots = len(chunk.w_o)
        of_tokens = {name: getattr(chunk, name).swapaxes(0, 1) for name in (*QUERIES, "k", "v")}
        of_tokens["x"] = jnp.broadcast_to(chunk.x, (slots, *chunk.x.shape))
        new = {name: stats[name].at[:, chunk.positions].set(x) for name, x in of_tokens.items()}
        new["num_chunks"] = stats["num_chunks"] + 1
        new["length"] = jnp.broadcast_to(chunk.length, slots)
        return new | {"w_o": chunk.w_o}

    def score(self, stats: Stats, k: Any, v: Any, length: Any, budgets: Any) -> Scores:
        # The oracle ranks by recorded keys; these are read from the carry.
        return Scores(k.max(-1), secondary=-k.max(-1))


QUERIES = ("q", "q_unrotated")


@dataclass(frozen=True)
class BySecondary:
    """Every head keeps the tokens that are best by the second ranking."""

    def __call__(self, scores: Scores, budgets: Any) -> Any:
        assert scores.secondary is not None
        return keep_top(jnp.where(scores.primary > -jnp.inf, scores.secondary, -jnp.inf), budgets)


class Prefill:
    """Drives the prefill's programs for one prompt on two devices, with copied heads."""

    def __init__(self, checkpoint: Path, methods: tuple[Method, ...], chosen: int):
        opened = open_checkpoint(checkpoint)
        tokens = ((90.0, 30.0, 20.0), (10.0, 25.0, 80.0))
        profile = Profile(model="", policy="ada_snapkv", budget=50, tokens=tokens)
        plan = make_plan(profile, 2, "fair_copying", max_extra_replicas=1)
        self.layout = SlotLayout.from_plan(plan)
        self.mesh = make_mesh(2)
        self.model = load_model(
            opened, self.layout, self.mesh, "float32", int8=False, progress=False
        )
        self.methods, self.chosen = methods, jnp.int32(chosen)
        self.slots = self.layout.head_of_slot, self.layout.first_slot
        self.carry: PrefillCarry = start_prefill(
            self.model,
            jnp.array(PROMPT),
            jnp.int32(0),
            jnp.zeros(len(PROMPT), jnp.int32),
            mesh=self.mesh,
            chunk_size=CHUNK,
            methods=methods,
            max_kept=MAX_KEPT,
        )

    def run(self, start: int, stop: int) -> None:
        chunks = jnp.int32(start), jnp.int32(stop)
        static: dict[str, Any] = {"mesh": self.mesh, "methods": self.methods, "chunk_size": CHUNK}
        static["max_kept"] = MAX_KEPT
        args = (jnp.int32(LENGTH), self.chosen, jnp.bool_(False), chunks, *self.slots)
        self.carry, _ = run_chunks(self.model, self.carry, *args, **static)

    def compress(self, layer: int) -> None:
        budgets = jnp.full((2, 3), BUDGET, jnp.int32)
        args = (jnp.int32(layer), jnp.int32(LENGTH), budgets, self.chosen, *self.slots)
        self.carry = compress_layer(
            self.carry, *args, mesh=self.mesh, methods=self.methods, max_kept=MAX_KEPT
        )

    def kept(self, layer: int) -> list[np.ndarray]:
        kept = kept_tokens(self.carry.prefix, self.layout, positions=True)
        assert kept.positions is not None
        return kept.positions[layer]


@pytest.fixture(scope="module")
def recorder(tiny_checkpoint: Path) -> Recorder:
    return Recorder(open_checkpoint(tiny_checkpoint).config.hidden_size)


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path) -> Forward:
    return forward(read_llama(tiny_checkpoint), PROMPT)


def test_a_scorer_observes_every_chunk_of_a_layer(
    tiny_checkpoint: Path, recorder: Recorder, dense: Forward
):
    """All fields against NumPy; the layer's chunks run in two calls, the next layer's in one."""
    snapkv = make_method(KVConfig("snapkv", budget=50))
    other = Method(recorder, Uniform(), is_query_agnostic=True)
    prefill = Prefill(tiny_checkpoint, (snapkv, other), chosen=1)
    prefill.run(0, 3)
    prefill.run(3, 4)
    window, got = prefill.carry.stats
    assert not np.asarray(window).any()  # the scorer that was not chosen
    got = jax.tree.map(np.asarray, got)
    llama = read_llama(tiny_checkpoint)
    head_dim, group = llama.head_dim, llama.num_heads // llama.num_kv_heads

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ llama.weights[f"layers.0.{name}_proj"].T).reshape(LENGTH, -1, head_dim)

    embedded = llama.weights["embed_tokens"][PROMPT]
    eps = np.float32(llama.rms_norm_eps)
    x = rms_norm(embedded, llama.weights["layers.0.input_layernorm"], eps)
    want = {
        "q": dense.q[0].reshape(-1, group, LENGTH, head_dim).swapaxes(1, 2),
        "q_unrotated": project(x, "q").reshape(LENGTH, -1, group, head_dim).swapaxes(0, 1),
        "k": dense.k[0],
        "v": project(x, "v").swapaxes(0, 1),
        "x": np.broadcast_to(x, (3, *x.shape)),
        "w_o": llama.weights["layers.0.o_proj"].T.reshape(3, group, head_dim, -1),
    }
    for slot, head in enumerate(prefill.layout.head_of_slot[0]):
        if head < 0:
            continue
        for name, value in want.items():
            recorded = got[name][slot] if name == "w_o" else got[name][slot, :LENGTH]
            np.testing.assert_allclose(recorded, value[head], atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(got["num_chunks"], 4)
    np.testing.assert_array_equal(got["length"], LENGTH)
    prefill.compress(0)
    prefill.run(4, 6)
    np.testing.assert_array_equal(prefill.carry.stats[1]["num_chunks"], 2)  # of layer 1 only


def test_an_allocator_sees_the_second_ranking_of_all_heads(
    tiny_checkpoint: Path, recorder: Recorder, dense: Forward
):
    method = Method(recorder, BySecondary(), is_query_agnostic=True)
    prefill = Prefill(tiny_checkpoint, (method,), chosen=0)
    for layer in range(2):
        prefill.run(4 * layer, 4 * layer + 4)
        prefill.compress(layer)
        for head, got in enumerate(prefill.kept(layer)):
            order = np.argsort(dense.k[layer][head].max(-1), kind="stable")
            np.testing.assert_array_equal(got, np.sort(order[:BUDGET]))


def test_heads_may_share_their_mean_score(
    tiny_checkpoint: Path, recorder: Recorder, dense: Forward
):
    method = Method(recorder, Uniform(), is_query_agnostic=True, mean_over_heads=True)
    prefill = Prefill(tiny_checkpoint, (method,), chosen=0)
    prefill.run(0, 4)
    prefill.compress(0)
    order = np.argsort(-dense.k[0].max(-1).mean(0), kind="stable")
    for got in prefill.kept(0):
        np.testing.assert_array_equal(got, np.sort(order[:BUDGET]))


@pytest.mark.parametrize(
    ("start", "stop", "keeps_whole", "calls"),
    [
        (0, 12, True, [(0, 12, None)]),
        (0, 12, False, [(0, 4, 0), (4, 8, 1), (8, 12, 2)]),
        (0, 3, False, [(0, 3, None)]),
        (3, 4, False, [(3, 4, 0)]),
        (3, 9, False, [(3, 4, 0), (4, 8, 1), (8, 9, None)]),
        (5, 7, True, [(5, 7, None)]),
        (4, 4, False, []),
    ],
)
def test_split_at_layers(start: int, stop: int, keeps_whole: bool, calls: list):
    """Four chunks per layer."""
    assert list(split_at_layers(start, stop, 4, keeps_whole=keeps_whole)) == calls
