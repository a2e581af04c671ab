"""Shares become rows: how many rows of a fixed batch each replica serves."""

import numpy as np


def row_counts(shares: np.ndarray, batch: int) -> np.ndarray:
    """Rounds shares to whole rows by the largest remainder.

    Every replica first gets the whole part of its due; the rows left over go, one each, to the
    largest remainders, ties to the lower device. So counts differ from their dues by less than 1.

    Args:
        shares: [..., P], adding to 1 over devices.

    Returns:
        int [..., P], adding to `batch`; 0 where the share is 0.
    """
    due = np.asarray(shares, np.float64) * batch
    if not np.allclose(due.sum(-1), batch):
        raise ValueError("the shares of every head must add to 1 over the devices")
    # A due within rounding of a whole number is that number.
    counts = np.floor(due + 1e-9).astype(int)
    remainder = np.where(np.asarray(shares) > 0, due - counts, -np.inf)
    order = np.argsort(-remainder, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return counts + (rank < batch - counts.sum(-1, keepdims=True))
