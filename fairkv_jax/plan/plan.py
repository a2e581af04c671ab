"""The plan: which devices hold which heads, and which share of the rows each replica serves."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from fairkv_jax.plan.cost import CostModel

SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Replica:
    """One head on one device, serving `share` of the rows."""

    head: int
    device: int
    share: float


Layer = tuple[Replica, ...]


@dataclass(frozen=True)
class Plan:
    """An assignment of every layer's heads to devices, with what it costs.

    Hashable, and a static argument of jitted steps.

    Raises:
        ValueError: a head has no replica, shares do not add to 1, or an index is out of range.
    """

    strategy: str
    row_split: str
    """How the rows of a replicated head are shared: "equal" or "proportional"."""
    num_devices: int
    num_heads: int
    layers: tuple[Layer, ...]
    """Per layer its replicas, sorted by (device, head)."""
    cost: CostModel
    utilization: float
    """Busy time over elapsed time of attention; an empty slot's time is not busy."""
    step_seconds: float
    """Attention's part of a step: the fullest device of each layer, added over layers."""
    lower_bound_seconds: float
    """No plan within the same limits has a shorter attention part."""
    one_more_replica_gain: float = 0.0
    """By which fraction one more replica per layer, beyond the limit, would raise the tokens/s."""
    fullest_tokens: float = 0.0
    """Cached tokens of one row, over all layers, on the device that holds the most."""
    model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(_sorted(layer) for layer in self.layers))
        for index, layer in enumerate(self.layers):
            _check_layer(index, layer, self.num_heads, self.num_devices)

    @property
    def rest_seconds(self) -> float:
        """The part of a step that no plan changes."""
        return self.cost.rest_seconds

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def slots(self) -> int:
        """Head slots per device and layer (C): one number for the model."""
        return max(int(self.replicas().sum(1).max()), 1) if self.layers else 1

    @property
    def num_extra_replicas(self) -> int:
        """Replicas beyond one per head, over all layers."""
        return sum(len(layer) - self.num_heads for layer in self.layers)

    @property
    def gap(self) -> float:
        """How far, relatively, the attention part may be above the best one."""
        return self.step_seconds / self.lower_bound_seconds - 1

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, over all rows of the batch."""
        return self.cost.batch / (self.step_seconds + self.rest_seconds)

    @property
    def device_bytes(self) -> float:
        """Weights and cached tokens on the fullest device."""
        weights = self.cost.rest_bytes + self.num_layers * self.slots * self.cost.head_bytes
        return weights + self.cost.batch * self.fullest_tokens * self.cost.token_bytes

    def replicas(self) -> np.ndarray:
        """Where each head has a replica, bool [L, K, P]."""
        return self.shares() > 0

    def shares(self) -> np.ndarray:
        """The share of the rows that each device serves of each head, [L, K, P]."""
        shares = np.zeros((len(self.layers), self.num_heads, self.num_devices))
        for index, layer in enumerate(self.layers):
            for replica in layer:
                shares[index, replica.head, replica.device] = replica.share
        return shares

    def head_of_slot(self) -> np.ndarray:
        """The head in every slot, int32 [L, P, C]; -1 is empty, heads ascend in a device."""
        slots = np.full((len(self.layers), self.num_devices, self.slots), -1, np.int32)
        for index, layer in enumerate(self.layers):
            filled = [0] * self.num_devices
            for replica in layer:
                slots[index, replica.device, filled[replica.device]] = replica.head
                filled[replica.device] += 1
        return slots

    def to_json(self) -> str:
        """The file that `serve --head-plan` takes."""
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
        """Reads `to_json`'s format; what follows from the rest is computed anew.

        Raises:
            ValueError: the text is not such an object; the message names what is wrong.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"a plan is a JSON object, got {type(record).__name__}")
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
                f"layer {index} of the plan places head {replica.head} on device {replica.device}, "
                f"but there are {num_heads} heads and {num_devices} devices"
            )
        if not 0 < replica.share <= 1 + SHARE_TOLERANCE:
            raise ValueError(
                f"layer {index}, head {replica.head}: a share must lie in (0, 1], "
                f"got {replica.share}"
            )
        shares[replica.head] += replica.share
    if len({(replica.head, replica.device) for replica in layer}) != len(layer):
        raise ValueError(f"layer {index} of the plan places a head twice on one device")
    for head, share in enumerate(shares):
        if abs(share - 1) > SHARE_TOLERANCE:
            raise ValueError(
                f"layer {index}, head {head}: the shares of its replicas add to {share}, not 1"
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
                f"layer {index} of the plan: a replica is an object with head, device and share, "
                f"got {entry!r}"
            )
        replicas.append(Replica(entry["head"], entry["device"], float(entry["share"])))
    return tuple(replicas)
