"""The cost model of a decode step: seconds per head slot and per cached token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from fairkv_jax.kv_cache_spec import token_bytes
from fairkv_jax.plan.shape import ModelShape


@dataclass(frozen=True)
class Hardware:
    """The memory of a device: its bandwidth and its size."""

    bandwidth: float
    """Bandwidth of the main memory in bytes per second, as published by the vendor."""
    memory_bytes: int


MAX_BATCH = 256
"""Default maximum of rows in the decode batch."""
MEMORY_UTILIZATION = 0.9
"""Fraction of a device's memory for weights and KV cache, as in the engine."""

OBJECTIVES = ("latency", "throughput")
HARDWARE: dict[str, Hardware] = {
    "A100": Hardware(2.039e12, 80 * 10**9),
    "H100": Hardware(3.35e12, 80 * 10**9),
    "H200": Hardware(4.8e12, 141 * 10**9),
    "L4": Hardware(0.3e12, 24 * 10**9),
    "L40": Hardware(0.864e12, 48 * 10**9),
    "CPU": Hardware(0.04e12, 16 * 10**9),
}
"""Hardware by name. A100 is the 80 GB SXM card, L40 also an L40S, CPU a small virtual machine."""


@dataclass(frozen=True)
class CostModel:
    """The time of one decode step: a seconds per slot, b per cached token, and a constant rest.

    With C slots per layer and device, and `tokens` cached tokens of one row on device p, this
    device spends C * a + batch * tokens * b seconds in the layer. Empty slots also cost `a`: they
    are computed with zero weights, because C is the same for all layers.

    >>> from fairkv_jax.plan import SHAPES, CostModel
    >>> cost = CostModel.of(SHAPES["llama-3.1-8b"], num_devices=8, hardware="H100", batch=64)
    >>> f"{cost.a_seconds * 1e6:.1f} us per slot, {cost.b_seconds_per_token * 1e9:.2f} ns per token"
    '3.1 us per slot, 0.15 ns per token'

    Raises:
        ValueError: a figure is negative or not finite, or the batch is not positive.
    """

    a_seconds: float
    b_seconds_per_token: float
    batch: int
    """Rows of the decode batch."""
    rest_seconds: float = 0.0
    """Time that no plan changes: MLPs and logits, sharded evenly over the devices."""
    head_bytes: float = 0.0
    """Bytes of the weights of one head slot in one layer."""
    token_bytes: float = 0.0
    """Bytes of the key and value of one cached token per head, scales included."""
    rest_bytes: float = 0.0
    """Bytes of all other weights on one device."""
    hardware: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "hardware":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not isinstance(self.batch, int) or self.batch < 1:
            raise ValueError(f"batch must be an integer of at least 1, got {self.batch!r}")
        if self.b_seconds_per_token == 0:
            raise ValueError(
                "b_seconds_per_token must be positive: the planner balances cached tokens"
            )

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        num_devices: int,
        hardware: str = "H100",
        *,
        batch: int,
        itemsize: int = 2,
        kv_cache_dtype: str = "auto",
    ) -> Self:
        """Derives the cost of a model on `num_devices` devices from their memory bandwidth.

        A decode step reads each weight once, whatever the batch, and each cached token once.
        `itemsize` is the number of bytes per weight, and with the `kv_cache_dtype` "auto" per
        element of the KV cache too; otherwise the cache is as `KVCacheSpec` describes that type.
        """
        if hardware not in HARDWARE:
            raise ValueError(f"hardware must be one of {', '.join(HARDWARE)}, got {hardware!r}")
        bandwidth = HARDWARE[hardware].bandwidth
        head_bytes = shape.head_params * itemsize
        token_bytes = _token_bytes(shape.head_dim, itemsize, kv_cache_dtype)
        rest_bytes = shape.rest_params * itemsize / num_devices
        return cls(
            a_seconds=head_bytes / bandwidth,
            b_seconds_per_token=token_bytes / bandwidth,
            batch=batch,
            rest_seconds=rest_bytes / bandwidth,
            head_bytes=head_bytes,
            token_bytes=token_bytes,
            rest_bytes=rest_bytes,
            hardware=hardware,
        )

    @classmethod
    def tokens_only(
        cls,
        hardware: str = "H100",
        *,
        batch: int,
        head_dim: int = 128,
        itemsize: int = 2,
        kv_cache_dtype: str = "auto",
    ) -> Self:
        """For a model of unknown widths: weights count nothing, only tokens do."""
        token_bytes = _token_bytes(head_dim, itemsize, kv_cache_dtype)
        b = token_bytes / HARDWARE[hardware].bandwidth
        return cls(0.0, b, batch=batch, token_bytes=token_bytes, hardware=hardware)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Reads the `cost` object of a plan's JSON."""
        missing = [
            name for name in ("a_seconds", "b_seconds_per_token", "batch") if name not in record
        ]
        if missing:
            raise ValueError(f"the plan's cost lacks {', '.join(missing)}")
        return cls(**{name: record[name] for name in cls.__dataclass_fields__ if name in record})


def _token_bytes(head_dim: int, itemsize: int, kv_cache_dtype: str) -> int:
    """Returns the bytes of a cached token per head; with "auto", of elements of `itemsize`."""
    if kv_cache_dtype == "auto":
        return 2 * head_dim * itemsize
    return token_bytes(head_dim, kv_cache_dtype)


@dataclass(frozen=True)
class Objective:
    """What a plan minimises: the step time at a given batch, or the time per generated token.

    "latency" minimises the step time at the cost model's batch. "throughput" minimises the time
    per token at the largest batch that fits into `device_bytes`, so that a plan whose fullest
    device holds less serves more rows. `device_bytes` limits the weights, empty slots and cached
    tokens per device.

    Raises:
        ValueError: the objective is unknown, or it needs a figure that is not given.
    """

    cost: CostModel
    num_layers: int
    name: str = "latency"
    device_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.name!r}")
        if self.device_bytes is None:
            if self.name == "throughput":
                raise ValueError(
                    "objective 'throughput' needs device_bytes, which determines the batch"
                )
        elif not self.device_bytes > 0:
            raise ValueError(f"device_bytes must be positive, got {self.device_bytes!r}")
        elif not self.cost.token_bytes > 0:
            raise ValueError(
                "device_bytes needs a cost model with token_bytes: give the model's shape"
            )

    def weight_bytes(self, slots: int) -> float:
        """Returns the bytes of the weights on one device with `slots` slots per layer."""
        return self.cost.rest_bytes + self.num_layers * slots * self.cost.head_bytes

    def batch(self, slots: int, fullest_tokens: float) -> int:
        """Returns the batch of a plan; 0 if it does not fit into the memory.

        `fullest_tokens` is the number of tokens of one row, summed over layers, on the device that
        holds the most.
        """
        if self.device_bytes is None:
            return self.cost.batch
        free = self.device_bytes - self.weight_bytes(slots)
        fits = max(0, int(free / (fullest_tokens * self.cost.token_bytes)))
        if self.name == "throughput":
            return fits
        return self.cost.batch if fits >= self.cost.batch else 0

    def attention_seconds(self, slots: int, peak_tokens: float, batch: int) -> float:
        """Returns the time of attention in one step, summed over layers.

        `peak_tokens` is the number of tokens of one row on the fullest device of each layer, summed
        over layers.
        """
        weights = self.num_layers * slots * self.cost.a_seconds
        return weights + batch * peak_tokens * self.cost.b_seconds_per_token

    def token_seconds(self, slots: int, peak_tokens: float, fullest_tokens: float) -> float:
        """Returns the seconds per generated token; infinite if the plan does not fit."""
        batch = self.batch(slots, fullest_tokens)
        if not batch:
            return float("inf")
        step = self.attention_seconds(slots, peak_tokens, batch) + self.cost.rest_seconds
        return step / batch

    def at(self, batch: int) -> CostModel:
        """Returns the cost model with another batch."""
        return replace(self.cost, batch=batch)
