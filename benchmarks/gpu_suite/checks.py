"""What the figures are held against, where they have been measured."""

from collections.abc import Iterator
from math import inf
from typing import Any

from fairkv_jax.pallas.ragged_decode import BACKENDS

WIDTH, LENGTHS = 128, "imbalanced"
OF_COPY, OVER_PEERS, FOR_IMBALANCE, OF_PREDICTED = 0.8, 1.3, 1.1, 0.95


def checks(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a check: what, the value, at least or at most what, and whether it holds."""
    found = [*_of_bandwidth(results.get("bandwidth", [])), *_of_plans(results.get("parallel", []))]
    for record in found:
        least, most = record.get("at_least", -inf), record.get("at_most", inf)
        record["holds"] = bool(least <= record["value"] <= most)  # NumPy's is no JSON
    return found


def _of_bandwidth(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    timed = [r for r in records if r.get("width") == WIDTH and "bytes_per_second" in r]
    batch = max((record["batch"] for record in timed), default=0)
    speed = {
        (record["implementation"], record["lengths"]): record
        for record in timed
        if record["batch"] == batch
    }
    peers = [
        record["bytes_per_second"]
        for (name, lengths), record in speed.items()
        if name not in BACKENDS and lengths == LENGTHS
    ]
    for name in BACKENDS:
        uneven, even = speed.get((name, LENGTHS)), speed.get((name, "uniform"))
        if uneven is None or name == "reference":
            continue
        yield {"check": f"{name} of the copy", "value": uneven["of_copy"], "at_least": OF_COPY}
        if peers:
            over = uneven["bytes_per_second"] / max(peers)
            yield {"check": f"{name} over the peers", "value": over, "at_least": OVER_PEERS}
        if even:
            cost = even["bytes_per_second"] / uneven["bytes_per_second"]
            yield {"check": f"{name} for imbalance", "value": cost, "at_most": FOR_IMBALANCE}


def _of_plans(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The worst of all models, numbers of devices, and equal batch or memory."""
    copying = [record for record in records if record.get("strategy") == "fair_copying"]
    if not copying:
        return
    measured = [record["tokens_per_second_over_static"] for record in copying]
    predicted = [record["predicted_tokens_per_second_over_static"] for record in copying]
    kept = min(m / p for m, p in zip(measured, predicted, strict=True))
    yield {"check": "fair_copying over static", "value": min(measured), "at_least": 1.0}
    yield {"check": "that, of the predicted", "value": kept, "at_least": OF_PREDICTED}
