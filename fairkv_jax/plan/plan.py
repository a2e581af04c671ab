"""The head plan: the devices of every head's replicas, and the share of rows that each serves."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from fairkv_jax.plan.cost import CostModel

SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Replica:
    """One replica of a head on a device, which serves the fraction `share` of the rows."""

    head: int
    device: int
    share: float


Layer = tuple[Replica, ...]


@dataclass(frozen=True)
class Plan:
    """An assignment of every layer's heads to devices, and its cost.

    Plans are hashable.

    >>> from fairkv_jax.plan import Profile, make_plan
    >>> plan = make_plan(Profile.uniform(num_layers=1, num_heads=4, tokens=100), 2, "static")
    >>> plan.head_of_slot().tolist()  # [L, P, C]
    [[[0, 1], [2, 3]]]
    >>> plan.layers[0][0]
    Replica(head=0, device=0, share=1.0)

    Raises:
        ValueError: a head has no replica, shares do not add to 1, or an index is out of range.
    """

    strategy: str
    row_split: str
    """How the rows of a replicated head are divided: "equal" or "proportional"."""
    num_devices: int
    num_heads: int
    layers: tuple[Layer, ...]
    """The replicas of each layer, sorted by (device, head)."""
    cost: CostModel
    utilization: float
    """Busy time divided by elapsed time in attention; the time of empty slots is not busy."""
    step_seconds: float
    """Time of attention in a step: that of each layer's fullest device, summed over layers."""
    lower_bound_seconds: float
    """Lower bound of `step_seconds` over all plans within the same limits."""
    one_more_replica_gain: float = 0.0
    """Relative gain in tokens/s of one more replica per layer than the limit allows."""
    fullest_tokens: float = 0.0
    """Cached tokens of one row, over all layers, on the device that holds the most."""
    model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(_sorted(layer) for layer in self.layers))
        for index, layer in enumerate(self.layers):
            _check_layer(index, layer, self.num_heads, self.num_devices)

    @property
    def rest_seconds(self) -> float:
        """Time of a step outside of attention, which no plan changes."""
        return self.cost.rest_seconds

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def slots(self) -> int:
        """Head slots per device and layer (C), the same for all layers."""
        return max(int(self.replicas().sum(1).max()), 1) if self.layers else 1

    @property
    def num_extra_replicas(self) -> int:
        """Replicas beyond one per head, over all layers."""
        return sum(len(layer) - self.num_heads for layer in self.layers)

    @property
    def gap(self) -> float:
        """Relative distance of `step_seconds` from its lower bound."""
        return self.step_seconds / self.lower_bound_seconds - 1

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, summed over the rows of the batch."""
        return self.cost.batch / (self.step_seconds + self.rest_seconds)

    @property
    def device_bytes(self) -> float:
        """Bytes of weights and cached tokens on the fullest device."""
        weights = self.cost.rest_bytes + self.num_layers * self.slots * self.cost.head_bytes
        return weights + self.cost.batch * self.fullest_tokens * self.cost.token_bytes

    def replicas(self) -> np.ndarray:
        """Returns whether a head has a replica on a device, bool [L, K, P]."""
        return self.shares() > 0

    def shares(self) -> np.ndarray:
        """The share of the rows that each device serves of each head, [L, K, P]."""
        shares = np.zeros((len(self.layers), self.num_heads, self.num_devices))
        for index, layer in enumerate(self.layers):
            for replica in layer:
                shares[index, replica.head, replica.device] = replica.share
        return shares

    def loads(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the cached tokens of one row on each device, [L, P], of `tokens` [L, K]."""
        return np.einsum("lk,lkp->lp", tokens, self.shares())

    def token_utilization(self, tokens: np.ndarray) -> float:
        """Returns the utilization if weights cost nothing, for heads that hold `tokens` [L, K].

        It is the mean number of cached tokens of the devices divided by the number on each layer's
        fullest device.
        """
        loads = self.loads(tokens)
        return float(loads.mean(1).sum() / loads.max(1).sum())

    def head_of_slot(self) -> np.ndarray:
        """Returns the head in every slot, int32 [L, P, C]; -1 marks empty slots.

        The heads of a device are in ascending order.
        """
        slots = np.full((len(self.layers), self.num_devices, self.slots), -1, np.int32)
        for index, layer in enumerate(self.layers):
            filled = [0] * self.num_devices
            for replica in layer:
                slots[index, replica.device, filled[replica.device]] = replica.head
                filled[replica.device] += 1
        return slots

    def to_json(self) -> str:
        """Returns the JSON file that `serve --head-plan` reads."""
        record = {
            "strategy": self.strategy,
            "row_split": self.row_split,
            "model": self.model,
            "num_devices": self.num_devices,
            "num_heads": self.num_heads,
            "slots": self.slots,
            "utilization": self.utilization,
            "step_seconds": self.step_seconds,
            "rest_seconds": self.rest_seconds,
            "lower_bound_seconds": self.lower_bound_seconds,
            "gap": self.gap,
            "one_more_replica_gain": self.one_more_replica_gain,
            "tokens_per_second": self.tokens_per_second,
            "fullest_tokens": self.fullest_tokens,
            "device_bytes": self.device_bytes,
            "cost": asdict(self.cost),
            "layers": [[asdict(replica) for replica in layer] for layer in self.layers],
        }
        return json.dumps(record) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the format of `to_json`; derived figures are recomputed.

        Raises:
            ValueError: the text is not a valid plan; the message names the invalid field.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"the plan must be a JSON object, got {type(record).__name__}")
        for old, new in _OLD_NAMES.items():
            if old in record:
                record.setdefault(new, record[old])
        for name, kinds in _FIELDS.items():
            value = record.get(name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                state = f"got {value!r}" if name in record else "it is missing"
                raise ValueError(f"the plan's {name} must be of type {_names(kinds)}, {state}")
        cost = CostModel.from_record(
            {"rest_seconds": record["rest_seconds"]} | dict(record["cost"])
        )
        layers = tuple(_read_layer(index, layer) for index, layer in enumerate(record["layers"]))
        if not layers:
            raise ValueError("the plan has no layers")
        heads = 1 + max((replica.head for layer in layers for replica in layer), default=0)
        heads = record.get("num_heads", heads)
        if isinstance(heads, bool) or not isinstance(heads, int):
            raise ValueError(f"the plan's num_heads must be of type int, got {heads!r}")
        optional = ("one_more_replica_gain", "fullest_tokens", "model")
        return cls(
            **{name: record[name] for name in _FIELDS if name in cls.__dataclass_fields__}
            | {name: record[name] for name in optional if name in record}
            | {"num_heads": heads, "layers": layers, "cost": cost}
        )


_OLD_NAMES = {
    "n_devices": "num_devices",
    "n_heads": "num_heads",
    "one_more_copy_gain": "one_more_replica_gain",
}
"""Deprecated keys of plan files and the keys that replaced them."""

_FIELDS: dict[str, tuple[type, ...]] = {
    "strategy": (str,),
    "row_split": (str,),
    "num_devices": (int,),
    "utilization": (int, float),
    "step_seconds": (int, float),
    "rest_seconds": (int, float),
    "lower_bound_seconds": (int, float),
    "cost": (dict,),
    "layers": (list,),
}


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _sorted(layer: Layer) -> Layer:
    return tuple(sorted(layer, key=lambda replica: (replica.device, replica.head)))


def _check_layer(index: int, layer: Layer, num_heads: int, num_devices: int) -> None:
    shares = [0.0] * num_heads
    for replica in layer:
        if not (0 <= replica.head < num_heads and 0 <= replica.device < num_devices):
            raise ValueError(
                f"layer {index} of the plan assigns head {replica.head} to device "
                f"{replica.device}, but there are {num_heads} heads and {num_devices} devices"
            )
        if not 0 < replica.share <= 1 + SHARE_TOLERANCE:
            raise ValueError(
                f"layer {index}, head {replica.head}: a share must be in (0, 1], "
                f"got {replica.share}"
            )
        shares[replica.head] += replica.share
    if len({(replica.head, replica.device) for replica in layer}) != len(layer):
        raise ValueError(f"layer {index} of the plan assigns a head twice to the same device")
    for head, share in enumerate(shares):
        if abs(share - 1) > SHARE_TOLERANCE:
            raise ValueError(
                f"layer {index}, head {head}: the shares of its replicas must sum to 1, got {share}"
            )


def _read_layer(index: int, layer: Any) -> Layer:
    if not isinstance(layer, list):
        raise ValueError(f"layer {index} of the plan must be a list of replicas, got {layer!r}")
    replicas = []
    for entry in layer:
        whole = isinstance(entry, Mapping) and all(
            isinstance(entry.get(name), int) and not isinstance(entry.get(name), bool)
            for name in ("head", "device")
        )
        if not whole or not isinstance(entry.get("share"), int | float):
            raise ValueError(
                f"layer {index} of the plan: a replica must have head, device and share, "
                f"got {entry!r}"
            )
        replicas.append(Replica(entry["head"], entry["device"], float(entry["share"])))
    return tuple(replicas)
