"""Errors of the devices as sentences: what was needed, what there is, and the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_BYTES = re.compile(r"allocat\w*\s+(\d[\d,]*)\s*(bytes)?", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])iB", re.IGNORECASE)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

WEIGHTS_DO_NOT_FIT = "use more devices (tensor_parallel_size), or fewer bytes (quantization, dtype)"
POOL_DOES_NOT_FIT = "lower gpu_memory_utilization (or kv_cache_memory_bytes), or max_num_seqs"
STEP_DOES_NOT_FIT = "lower gpu_memory_utilization (or kv_cache_memory_bytes), or max_model_len"


class DeviceError(RuntimeError):
    """What the engine asked of the devices failed there."""


@contextmanager
def translate_xla_errors(doing: str, way_out: str) -> Iterator[None]:
    """Turns XLA's errors while `doing` something into sentences; `way_out` if memory ran out.

    Raises:
        DeviceError: in place of `jax.errors.JaxRuntimeError`, which is its cause.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            reason = text.strip().partition("\n")[0]
            raise DeviceError(f"the devices failed while {doing}: {reason}") from error
        raise DeviceError(
            f"out of memory while {doing}: {_needed(text)}, {_available()}: {way_out}"
        ) from error


def _needed(text: str) -> str:
    """The bytes that XLA's message names."""
    if size := _SIZE.search(text):
        num_bytes = float(size[1]) * _UNITS[size[2].upper()]
    elif number := _BYTES.search(text):
        num_bytes = float(number[1].replace(",", ""))
    else:
        return "more was needed than there is"
    return f"{num_bytes / 2**30:.2f} GiB were needed at once"


def _available() -> str:
    """What the first device has left; the plan gives all of them about as much to hold."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return "which this host has not"
    free = (stats["bytes_limit"] - stats["bytes_in_use"]) / 2**30
    return f"{free:.2f} of {stats['bytes_limit'] / 2**30:.2f} GiB are free on a device"
