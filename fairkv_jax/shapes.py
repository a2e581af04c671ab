"""The axis letters of the whole project, and the names of the mesh axes.

| letter | axis                                                        |
|--------|-------------------------------------------------------------|
| B      | rows of the decode batch                                    |
| T      | prompt tokens                                               |
| S      | cached tokens                                               |
| N      | query heads                                                 |
| K      | KV heads                                                    |
| G      | query heads per KV head, N/K                                |
| H      | head dimension                                              |
| D      | hidden size                                                 |
| F      | MLP (intermediate) size                                     |
| V      | vocabulary                                                  |
| L      | layers                                                      |
| P      | devices on the `tensor` mesh axis                           |
| C      | head slots per device and layer                             |

A *slot* holds one KV head with its G query heads, the unit that is assigned, copied and
compressed. Arrays over all slots have an axis of P*C, sharded on `tensor`; inside `shard_map`
it is C.
"""

DATA_AXIS = "data"
TENSOR_AXIS = "tensor"

MAX_DECODE_STEPS = 8
"""Most decode steps that one call of the compiled program runs."""


def next_power_of_two(number: int) -> int:
    """The least power of two that is no smaller than `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller than `size`."""
    return -(-size // multiple) * multiple
