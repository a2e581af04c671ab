"""The interface of a model: what prefill, decode and loading use."""

from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Array, Float, Int

from fairkv_jax.config import ModelConfig

Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any, Any]]
"""(q [tokens,C,G,H], k, v [tokens,C,H], cache, this layer's inputs) -> (out, cache, outputs)."""


class Layer(Protocol):
    """One layer of a decoder, called inside `shard_map`."""

    def __call__(
        self, x: Array, angles: Array, attend: Attend, cache: Any, inputs: Any
    ) -> tuple[Array, Any, Any]:
        """Runs the layer: (hidden states, the cache, what `attend` returned as its outputs)."""
        ...

    def attention_inputs(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
        """The normalized hidden states that queries, keys and values are projected from."""
        ...

    def output_weights(self) -> Float[Array, "C G H D"]:
        """The output projection of this device's head slots."""
        ...


class Model(Protocol):
    """A decoder whose parameters are a pytree of `nnx.Param`, called inside `shard_map`.

    Every device holds C head slots of each layer and an even part of the MLPs and the vocabulary,
    and sees all tokens. The parameters lie at the paths that the model's `ParamSpec`s name.
    """

    config: ModelConfig
    dtype: Any
    """The type of activations, and of the weights that are not int8."""

    @property
    def slots_per_device(self) -> int:
        """Head slots of one layer on this device (C)."""
        ...

    def __call__(
        self,
        tokens: Int[Array, "tokens"],
        positions: Int[Array, "tokens"],
        attend: Attend,
        cache: Any,
        inputs: Any,
    ) -> tuple[Float[Array, "tokens D"], Any, Any]:
        """Runs all layers.

        `inputs` is a pytree of arrays with a leading layer axis; `attend` gets its layer's part.

        Returns:
            The hidden states before the last norm, the cache, and what `attend` returned as its
            outputs, stacked by layer.
        """
        ...

    def embedded(self, tokens: Int[Array, "tokens"]) -> Float[Array, "tokens D"]:
        """The hidden states that enter the first layer."""
        ...

    def angles(self, positions: Int[Array, "tokens"]) -> Float[Array, "tokens half"]:
        """The rotary angles of queries and keys at these positions."""
        ...

    def layer(self, index: Int[Array, ""]) -> Layer:
        """One layer of the stack."""
        ...

    def logits(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens V"]:
        """Next-token logits of hidden states, in float32, on every device."""
        ...
