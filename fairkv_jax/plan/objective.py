"""What a plan is judged by: seconds per generated token, at a given batch or a given memory."""

from dataclasses import dataclass, replace

from fairkv_jax.plan.cost import CostModel

OBJECTIVES = ("latency", "throughput")


@dataclass(frozen=True)
class Objective:
    """Latency: the least step time at the cost's batch. Throughput: the batch is free.

    `device_bytes` limits what one device holds: weights, empty slots and cached tokens. Under
    "throughput" it decides the batch, so that a plan whose fullest device holds less serves more
    rows with the same memory.

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
                    "objective 'throughput' needs device_bytes: the memory decides the batch"
                )
        elif not self.device_bytes > 0:
            raise ValueError(f"device_bytes must be positive, got {self.device_bytes!r}")
        elif not self.cost.token_bytes > 0:
            raise ValueError(
                "device_bytes needs a cost that knows token_bytes: give the model's shape"
            )

    def weight_bytes(self, slots: int) -> float:
        """Weights on one device with C slots a layer."""
        return self.cost.rest_bytes + self.num_layers * slots * self.cost.head_bytes

    def batch(self, slots: int, fullest_tokens: float) -> int:
        """The batch to run with; 0 where the memory does not allow it.

        `fullest_tokens` is what the fullest device holds of one row, over all layers.
        """
        if self.device_bytes is None:
            return self.cost.batch
        free = self.device_bytes - self.weight_bytes(slots)
        fits = max(0, int(free / (fullest_tokens * self.cost.token_bytes)))
        if self.name == "throughput":
            return fits
        return self.cost.batch if fits >= self.cost.batch else 0

    def attention_seconds(self, slots: int, peak_tokens: float, batch: int) -> float:
        """One step's attention: every slot and the fullest device's tokens, over all layers.

        `peak_tokens` is the fullest device's share of one row, summed over layers.
        """
        weights = self.num_layers * slots * self.cost.a_seconds
        return weights + batch * peak_tokens * self.cost.b_seconds_per_token

    def token_seconds(self, slots: int, peak_tokens: float, fullest_tokens: float) -> float:
        """Seconds per generated token; infinite where the memory does not allow it."""
        batch = self.batch(slots, fullest_tokens)
        if not batch:
            return float("inf")
        step = self.attention_seconds(slots, peak_tokens, batch) + self.cost.rest_seconds
        return step / batch

    def at(self, batch: int) -> CostModel:
        """The cost model with the batch that was decided."""
        return replace(self.cost, batch=batch)
