"""Eight CPU devices for every test process, and the two checkpoints that all tests share."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root
from tests.oracle.tiny import write_tiny_checkpoint

# Nothing above starts JAX, which reads this when it makes its devices. A number of devices that
# stands there already stays.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


_MANY_MAPS = 25_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long suites, and only these")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Selects the tests marked `long` with --long, and the others without it."""
    wants_long = config.getoption("--long")
    selected = [item for item in items if ("long" in item.keywords) == wants_long]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Forgets compiled programs after a file when there are many: they consist of memory maps.

    Linux grants a process 65,530 of them (vm.max_map_count), and XLA aborts at the next one.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2 layers, 6 query and 3 KV heads, with float32 weights."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """SmolLM2-135M-Instruct, which `make test` fetches; without it the tests fail and say so."""
    open_checkpoint(DEMO_MODEL)
    (file,) = (checkpoints_root() / DEMO_MODEL).glob("*.gguf")
    return file
