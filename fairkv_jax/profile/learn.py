"""Learns how much each KV head needs whole prompts, from the model's own answers.

attention   forward passes: the attention that a head pays to an answer that it must repeat
gates       DuoAttention (arXiv 2410.10819): gates between full and streaming attention, trained
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.models.model import Model
from fairkv_jax.plan import HeadScores, Profile, make_plan
from fairkv_jax.profile.dense_forward import (
    KeysAndValues,
    answer,
    gated_divergence,
    run_context,
)
from fairkv_jax.profile.examples import Example, make_examples
from fairkv_jax.profile.learn_config import LearnConfig
from fairkv_jax.sharding.load_weights import load_model
from fairkv_jax.sharding.mesh import make_mesh
from fairkv_jax.sharding.slots import SlotLayout

LEARNING_RATE = 0.03
FINAL_LEARNING_RATE = 0.003
PATH_WEIGHT = 0.1
"""Weight of a gate's mean over the training in its score. It ranks the gates that have all reached
0 or 1: one that closed later is needed more."""


@dataclass(frozen=True)
class ShardedModel:
    """A model whose heads lie on the devices in contiguous blocks, without replicas."""

    model: Model
    layout: SlotLayout
    mesh: Mesh

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        num_devices: int = 1,
        int8: bool = False,
        progress: bool = True,
    ) -> "ShardedModel":
        """Loads a checkpoint.

        Raises:
            ValueError: there are fewer devices, or the checkpoint cannot be read.
        """
        config = checkpoint.config
        mesh = make_mesh(num_devices)
        profile = Profile.uniform(config.num_layers, config.num_kv_heads, 1)
        layout = SlotLayout.from_plan(make_plan(profile, num_devices, "static"))
        return cls(
            load_model(checkpoint, layout, mesh, dtype, int8=int8, progress=progress), layout, mesh
        )

    def by_head(self, of_slots: np.ndarray) -> np.ndarray:
        """Returns an array [L, P*C, ...] over slots in the order of the heads, [L, K, ...]."""
        slots = self.layout.first_slot
        return of_slots[np.arange(len(slots))[:, None], slots]


@dataclass(frozen=True)
class Learned:
    """Scores, and how far they can be trusted."""

    scores: np.ndarray
    """float64 [L, K]"""
    accuracy: float
    """The fraction of the answers' tokens that the model predicts with full attention."""


def learn_head_scores(
    checkpoint: Checkpoint,
    config: LearnConfig,
    *,
    dtype: str,
    num_devices: int = 1,
    int8: bool = False,
    source: str = "",
    progress: bool = True,
) -> tuple[HeadScores, float]:
    """Loads a model and learns its head scores; also returns `Learned.accuracy`.

    Args:
        source: the description of how they were made that the scores carry.

    Raises:
        ValueError: the contexts do not suit the model, see `make_examples`, or it cannot be loaded.
    """
    examples = make_examples(
        checkpoint.tokenizer(),
        config,
        model=checkpoint.name,
        max_position_embeddings=checkpoint.config.max_position_embeddings,
        progress=progress,
    )
    model = ShardedModel.load(
        checkpoint, dtype=dtype, num_devices=num_devices, int8=int8, progress=progress
    )
    learn: Callable[..., Learned] = learn_gates
    if config.method == "attention":
        learn = measure_attention
    learned = learn(model, examples, config, progress=progress)
    scores = HeadScores(
        model=checkpoint.name,
        method=config.method,
        scores=learned.scores.round(6).tolist(),
        sinks=config.sinks,
        recent=config.recent,
        source=source,
    )
    return scores, learned.accuracy


def measure_attention(
    model: ShardedModel,
    examples: Sequence[Example],
    config: LearnConfig | None = None,
    *,
    progress: bool = True,
) -> Learned:
    """Scores a KV head by its attention to the answers that the model repeats.

    The score is the sum of the probabilities that a query head gives to an answer's tokens in the
    context, averaged over the positions that predict tokens of the context's answers, for the query
    head of the group that gives most; averaged over the contexts.
    """
    masses, correct = [], []
    for example in tqdm(examples, "contexts", disable=not progress):
        context = run_context(model.model, example, mesh=model.mesh)
        answers = answer(model.model, example, context, mesh=model.mesh)
        masses.append(attention_mass(model.by_head(np.asarray(answers.attention)), example))
        correct.append(_num_correct(example, answers.tokens))
    return Learned(np.mean(masses, axis=0), _fraction(correct))


def attention_mass(attention: np.ndarray, example: Example) -> np.ndarray:
    """Returns float64 [L, K] of `Answers.attention` in the order of the heads, [L, K, G, Q, S].

    Every answer token of the context counts once, whichever fact it belongs to.
    """
    num_tails, size = example.tails.shape
    weights = np.zeros(num_tails * size)
    np.add.at(weights, np.asarray(example.predicts), np.asarray(example.weights))
    by_query_head = np.einsum("lkgqs,qs->lkg", attention, weights.reshape(num_tails, size))
    return by_query_head.max(axis=-1)


def learn_gates(
    model: ShardedModel,
    examples: Sequence[Example],
    config: LearnConfig,
    *,
    progress: bool = True,
) -> Learned:
    """Trains a gate per KV head; the weights do not change.

    Every step minimises, on one context, KL(full || gated) over the answers plus `l1` times the
    mean gate. The gates start at 1 and are clipped to [0, 1] after every step.
    """
    head_of_slot = jnp.asarray(model.layout.head_of_slot)
    decay = FINAL_LEARNING_RATE / LEARNING_RATE
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, config.steps, decay)
    optimizer = optax.adam(schedule)
    config_of_model = model.model.config
    gates = jnp.ones((config_of_model.num_layers, config_of_model.num_kv_heads))
    state, path, correct = optimizer.init(gates), np.zeros(gates.shape), []
    with tqdm(range(config.steps), "steps", disable=not progress) as bar:
        for step in bar:
            example = examples[step % len(examples)]
            context = run_context(model.model, example, mesh=model.mesh)
            answers = answer(model.model, example, context, mesh=model.mesh)
            gates, state, divergence = _train_step(
                gates,
                state,
                model.model,
                example,
                context,
                answers.hidden,
                _is_kept(example, config),
                head_of_slot,
                config.l1,
                mesh=model.mesh,
                optimizer=optimizer,
            )
            path += np.asarray(gates) / config.steps
            correct.append(_num_correct(example, answers.tokens))
            bar.set_postfix(kl=f"{divergence:.3f}", open=int((gates > 0.5).sum()))
    return Learned(np.asarray(gates, np.float64) + PATH_WEIGHT * path, _fraction(correct))


@partial(jax.jit, static_argnames=("mesh", "optimizer"))
def _train_step(
    gates: Array,
    state: Any,
    model: Model,
    example: Example,
    context: KeysAndValues,
    hidden: Array,
    is_kept: Array,
    head_of_slot: Array,
    l1: float,
    *,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
) -> tuple[Array, Any, Array]:
    """Updates the gates; also returns the divergence before the step."""

    def loss(gates: Array) -> tuple[Array, Array]:
        divergence = gated_divergence(
            gates, model, example, context, hidden, is_kept, head_of_slot, mesh=mesh
        )
        return divergence + l1 * jnp.mean(gates), divergence

    (_, divergence), gradient = jax.value_and_grad(loss, has_aux=True)(gates)
    updates, state = optimizer.update(gradient, state)
    updated: Any = optax.apply_updates(gates, updates)
    return jnp.clip(updated, 0, 1), state, divergence


def _is_kept(example: Example, config: LearnConfig) -> Array:
    """The tokens of a context that closed gates let through, [T] bool."""
    position = jnp.arange(len(example.context))
    is_recent = position >= example.length - config.recent
    return (position < example.length) & ((position < config.sinks) | is_recent)


def _num_correct(example: Example, tokens: Array) -> tuple[int, int]:
    """The number of answer tokens that the model predicts, and of all."""
    is_answer = np.asarray(example.weights) > 0
    is_correct = np.asarray(tokens) == np.asarray(example.targets)
    return int((is_correct & is_answer).sum()), int(is_answer.sum())


def _fraction(counts: Sequence[tuple[int, int]]) -> float:
    correct, total = np.sum(counts, axis=0)
    return float(correct / total)
