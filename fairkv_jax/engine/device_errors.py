"""Translates XLA's errors into messages with the needed and free memory, and what to change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_BYTES = re.compile(r"allocat\w*\s+(\d[\d,]*)\s*(bytes)?", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])iB", re.IGNORECASE)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

WEIGHTS_DO_NOT_FIT = (
    "use more devices (tensor_parallel_size) or a smaller type (quantization, dtype)"
)
POOL_DOES_NOT_FIT = "lower gpu_memory_utilization (or kv_cache_memory_bytes), or max_num_seqs"
STEP_DOES_NOT_FIT = "lower gpu_memory_utilization (or kv_cache_memory_bytes), or max_model_len"


class DeviceError(RuntimeError):
    """An operation failed on the devices."""


@contextmanager
def translate_xla_errors(doing: str, way_out: str) -> Iterator[None]:
    """Converts XLA's errors into `DeviceError`.

    Args:
        doing: what the body does, for the message.
        way_out: what the user can change if the memory does not suffice.

    Raises:
        DeviceError: the body raised `jax.errors.JaxRuntimeError`, which is its cause.
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
    """Describes the number of bytes in XLA's message."""
    if size := _SIZE.search(text):
        num_bytes = float(size[1]) * _UNITS[size[2].upper()]
    elif number := _BYTES.search(text):
        num_bytes = float(number[1].replace(",", ""))
    else:
        return "an unknown number of bytes was needed"
    return f"{num_bytes / 2**30:.2f} GiB were needed at once"


def _available() -> str:
    """Describes the free memory of the first device, which represents all of them."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return "more than this host has"
    free = (stats["bytes_limit"] - stats["bytes_in_use"]) / 2**30
    return f"{free:.2f} of {stats['bytes_limit'] / 2**30:.2f} GiB are free on the first device"
