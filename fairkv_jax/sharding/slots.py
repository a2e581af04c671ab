"""The layout of head slots: which KV head each slot of every device holds, layer by layer.

JAX shards evenly, so each of the P devices has C slots per layer, some of which are empty:

    plan      device 0: heads 0, 2     device 1: heads 1, 2        (head 2 has two replicas)
    slots     [0, 2 | 1, 2]                                        head_of_slot[l], P*C entries
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fairkv_jax.plan import Plan

EMPTY = -1


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """Which head each slot holds. All arrays are NumPy int32 and read-only."""

    num_devices: int
    num_heads: int
    head_of_slot: np.ndarray
    """[L, P*C], EMPTY for slots without a head. Device p has slots p*C to p*C + C - 1."""
    slot_of_head: np.ndarray
    """[L, K, P]: the slot of the head's replica on each device, EMPTY if there is none."""

    @classmethod
    def from_plan(cls, plan: Plan) -> "SlotLayout":
        by_device = plan.head_of_slot()
        num_layers, num_devices, slots = by_device.shape
        slot_of_head = np.full((num_layers, plan.num_heads, num_devices), EMPTY, np.int32)
        for layer, device, slot in zip(*np.nonzero(by_device != EMPTY), strict=True):
            head = by_device[layer, device, slot]
            slot_of_head[layer, head, device] = device * slots + slot
        head_of_slot = by_device.reshape(num_layers, num_devices * slots).astype(np.int32)
        head_of_slot.flags.writeable = slot_of_head.flags.writeable = False
        return cls(num_devices, plan.num_heads, head_of_slot, slot_of_head)

    @property
    def num_slots(self) -> int:
        """Slots per layer over all devices (P*C)."""
        return self.head_of_slot.shape[1]

    @property
    def slots_per_device(self) -> int:
        return self.num_slots // self.num_devices

    @cached_property
    def replicas(self) -> np.ndarray:
        """[L, K, P] bool: whether each device holds a replica of each head."""
        return self.slot_of_head != EMPTY

    @property
    def has_copies(self) -> bool:
        """Whether a head has replicas on several devices."""
        return bool((self.replicas.sum(-1) > 1).any())

    @cached_property
    def first_slot(self) -> np.ndarray:
        """[L, K]: the first slot that holds the head; its scores are used for all replicas."""
        is_head = self.head_of_slot[:, None] == np.arange(self.num_heads)[:, None]
        return np.argmax(is_head, axis=-1).astype(np.int32)
