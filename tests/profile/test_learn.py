"""Learned head scores: against NumPy, on several devices, and gradients by finite differences."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.plan import shipped_head_scores
from fairkv_jax.profile.dense_forward import answer, gated_divergence, run_context
from fairkv_jax.profile.examples import Example, make_examples
from fairkv_jax.profile.learn import (
    ShardedModel,
    learn_gates,
    learn_head_scores,
    measure_attention,
)
from fairkv_jax.profile.learn_config import LearnConfig
from tests.oracle.forward import forward, read_llama, softmax
from tests.oracle.tiny import write_tiny_checkpoint

CONFIG = LearnConfig(num_contexts=2, context_tokens=320, steps=4, l1=0.1)


def load(path: Path, num_devices: int = 1, *, int8: bool = False) -> ShardedModel:
    return ShardedModel.load(
        open_checkpoint(path), dtype="float32", num_devices=num_devices, int8=int8, progress=False
    )


def examples_for(path: Path, config: LearnConfig = CONFIG) -> list[Example]:
    checkpoint = open_checkpoint(path)
    longest = checkpoint.config.max_position_embeddings
    tokenizer = checkpoint.tokenizer()
    return make_examples(
        tokenizer, config, model="tiny", max_position_embeddings=longest, progress=False
    )


@pytest.fixture(scope="module")
def examples(tiny_checkpoint: Path) -> list[Example]:
    return examples_for(tiny_checkpoint)


def attention_mass(path: Path, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The score of every head [L, K] on one example in NumPy, and the tokens that are predicted."""
    llama = read_llama(path)
    masses, tokens = [], []
    predicts = np.asarray(example.predicts).reshape(len(example.tails), -1)
    used = np.asarray(example.weights).reshape(predicts.shape) > 0
    length, size = int(example.length), example.tails.shape[1]
    for row, tail in enumerate(np.asarray(example.tails)):
        ids = [*np.asarray(example.context)[:length], *tail]
        is_fact = np.asarray(example.is_fact)[row, :length]
        positions = length + predicts[row, used[row]] - row * size
        passed = forward(llama, ids)
        tokens += [np.argmax(forward(llama, ids[: at + 1]).logits) for at in positions]
        masses.append([])
        for q, k in zip(passed.q, passed.k, strict=True):
            group = len(q) // len(k)
            by_query_head = np.empty((len(positions), len(q)))
            for i, at in enumerate(positions):
                for head in range(len(q)):
                    scores = k[head // group, : at + 1] @ q[head, at] / np.sqrt(q.shape[-1])
                    by_query_head[i, head] = softmax(scores)[:length][is_fact].sum()
            masses[-1].append(by_query_head.reshape(len(positions), len(k), group))
    of_tokens = np.concatenate([np.stack(of_fact, 1) for of_fact in masses])  # [tokens, L, K, G]
    return of_tokens.mean(0).max(-1), np.array(tokens)


@pytest.mark.parametrize(
    ("architecture", "num_devices"),
    [("llama", 1), ("llama", 2), ("llama", 3), ("qwen2", 2), ("qwen3", 2), ("gemma", 2)],
)
def test_attention_to_the_facts_is_that_of_numpy(
    architecture: str, num_devices: int, tmp_path: Path
):
    path = write_tiny_checkpoint(tmp_path / "tiny.gguf", architecture=architecture)
    example = examples_for(path, replace(CONFIG, num_contexts=1))[0]
    want, tokens = attention_mass(path, example)
    got = measure_attention(load(path, num_devices), [example], progress=False)
    np.testing.assert_allclose(got.scores, want, rtol=1e-3, atol=1e-6)
    targets = np.asarray(example.targets)[np.asarray(example.weights) > 0]
    assert got.accuracy == pytest.approx((tokens == targets).mean())


LEARNERS = (measure_attention, learn_gates)


@pytest.fixture(scope="module")
def on_one_device(tiny_checkpoint: Path, examples: list[Example]) -> list[np.ndarray]:
    model = load(tiny_checkpoint)
    return [learn(model, examples, CONFIG, progress=False).scores for learn in LEARNERS]


@pytest.mark.parametrize("num_devices", [2, 3])
def test_scores_are_those_of_one_device(
    num_devices: int,
    tiny_checkpoint: Path,
    examples: list[Example],
    on_one_device: list[np.ndarray],
):
    model = load(tiny_checkpoint, num_devices)
    for learn, want in zip(LEARNERS, on_one_device, strict=True):
        got = learn(model, examples, CONFIG, progress=False).scores
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=learn.__name__)
        assert np.unique(want.round(6)).size > 1


def divergence(model: ShardedModel, example: Example):
    """The divergence as a function of the gates [L, K]; closed gates keep 40 tokens."""
    context = run_context(model.model, example, mesh=model.mesh)
    hidden = answer(model.model, example, context, mesh=model.mesh).hidden
    position = np.arange(len(example.context))
    length = int(example.length)
    is_kept = (position < 8) | ((position >= length - 32) & (position < length))

    def of_gates(gates):
        return gated_divergence(
            gates,
            model.model,
            example,
            context,
            hidden,
            jnp.asarray(is_kept),
            jnp.asarray(model.layout.head_of_slot),
            mesh=model.mesh,
        )

    return of_gates


@pytest.mark.parametrize(("num_devices", "int8"), [(1, False), (2, False), (3, True)])
def test_the_gradient_of_the_gates_is_the_finite_difference(
    num_devices: int, int8: bool, tiny_checkpoint: Path, examples: list[Example]
):
    of_gates = jax.jit(divergence(load(tiny_checkpoint, num_devices, int8=int8), examples[0]))
    gates = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.8, (2, 3)), jnp.float32)
    assert of_gates(jnp.ones((2, 3))) == pytest.approx(0, abs=1e-5)
    gradient = np.asarray(jax.grad(of_gates)(gates))
    step = 1e-2
    for layer, head in np.ndindex(2, 3):
        up, down = (of_gates(gates.at[layer, head].add(sign * step)) for sign in (1, -1))
        want = float(up - down) / (2 * step)
        assert gradient[layer, head] == pytest.approx(want, rel=0.02, abs=2e-3)


@pytest.mark.long
def test_the_gate_of_a_head_that_does_nothing_closes(
    tiny_checkpoint: Path, examples: list[Example]
):
    model = load(tiny_checkpoint)
    out = model.model.layers.attention.out  # pyright: ignore[reportAttributeAccessIssue]
    out.set_value(out.get_value().at[0, 1].set(0))
    config = replace(CONFIG, steps=60, l1=0.02)
    gates = learn_gates(model, examples, config, progress=False).scores
    needed = np.delete(gates.ravel(), 1)
    assert gates[0, 1] < 0.1
    assert needed.min() > gates[0, 1] + 0.2


def test_int8_weights_give_nearly_the_same_scores(tiny_checkpoint: Path, examples: list[Example]):
    floats, int8 = load(tiny_checkpoint, 2), load(tiny_checkpoint, 2, int8=True)
    want = measure_attention(floats, examples, progress=False).scores
    got = measure_attention(int8, examples, progress=False).scores
    np.testing.assert_allclose(got, want, rtol=0.3, atol=2e-3)
    assert (got != want).all()


@pytest.mark.parametrize("method", ["attention", "gates"])
def test_a_seed_reproduces_the_scores(method: str, tiny_checkpoint: Path):
    checkpoint = open_checkpoint(tiny_checkpoint)

    def learn(seed: int):
        config = replace(CONFIG, method=method, seed=seed)
        return learn_head_scores(checkpoint, config, dtype="float32", progress=False)[0]

    first, again, other = learn(1), learn(1), learn(2)
    assert first == again
    assert first.scores != other.scores
    assert (first.model, first.method, first.sinks, first.recent) == ("tiny", method, 8, 32)
    first.check_model(2, 3)


@pytest.mark.slow
def test_the_demo_model_ships_its_scores(demo_checkpoint: Path):
    """A few contexts rank the same heads as the shipped scores, which were learned from more."""
    checkpoint = open_checkpoint(demo_checkpoint)
    shipped = shipped_head_scores(checkpoint.name)
    assert shipped is not None
    config = LearnConfig(num_contexts=2, context_tokens=256, seed=1)
    learned, accuracy = learn_head_scores(
        checkpoint, config, dtype="float32", num_devices=2, progress=False
    )
    shipped.check_model(len(learned.scores), len(learned.scores[0]))
    assert accuracy > 0.9
    best = [set(np.argsort(-x.array, axis=None)[:15]) for x in (shipped, learned)]
    assert len(best[0] & best[1]) >= 11
