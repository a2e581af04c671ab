"""When rows are compressed again while they decode, and how many tokens their heads then keep.

Both follow from token counts alone: a request that is preempted, and whose generated tokens are
read again, is compressed again at the same places.
"""

from dataclasses import dataclass

import numpy as np

from fairkv_jax.shapes import next_power_of_two, round_up


@dataclass(frozen=True)
class DecodeCompression:
    """The compression of rows to `budget` tokens per head, on average over each layer's heads.

    It takes place whenever a multiple of `interval` generated tokens is in the cache, as soon as
    more than the budget would be there without it.
    """

    budget: int
    interval: int
    num_protected: int
    """The first and last tokens that each head keeps in any case."""

    def first_at(self, head_lengths: np.ndarray) -> int:
        """Generated tokens in the cache when a row is compressed first.

        `head_lengths` [L, K] are the tokens kept of its prompt.
        """
        room = self.budget * head_lengths.size - int(head_lengths.sum())
        return self.interval * max(1, room // head_lengths.size // self.interval + 1)

    def budgets(self, fixed_lengths: np.ndarray) -> np.ndarray:
        """Budgets [L, K] of a row that begins with a cached prefix of so many tokens, [L, K].

        The prefix counts towards the budget of its layer, and each head has an equal share of what
        it leaves. A share is at least what every head keeps in any case.
        """
        num_heads = fixed_lengths.shape[1]
        left = np.maximum(num_heads * self.budget - fixed_lengths.sum(1, keepdims=True), 0)
        shares = left // num_heads + (np.arange(num_heads) < left % num_heads)
        return (fixed_lengths + np.maximum(shares, self.num_protected)).astype(np.int32)

    def buckets(self, page_size: int, max_tokens: int) -> list[int]:
        """Returns the most tokens per head for which the programs are compiled, ascending.

        The first suffices where the heads hold about equally many, and the last in any case.
        """
        size, sizes = next_power_of_two(self.budget + self.interval), []
        while size < max_tokens:
            sizes.append(round_up(size, page_size))
            size *= 4
        return [*sizes, round_up(max_tokens, page_size)]
