"""Eight CPU devices for every test process, and the two checkpoints that all tests share."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

from fairkv_jax.checkpoint import open_checkpoint
from fairkv_jax.checkpoint.fetch import DEMO_MODEL, checkpoints_root
from tests.oracle.tiny import write_tiny_checkpoint

# Nothing above imports JAX, which reads the environment. What stands there already stays.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Most of the suite's time is compilation. All test processes, the servers that tests start and
# later runs share what they compile; where tests count compilations, the cache's programs count.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = Path(__file__).parent.parent / ".pytest_cache" / "jax-programs"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 << 30)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Compiling takes longer than running small models, so XLA optimises little. The flag that saves
# most is that of jaxlib 0.10; XLA ends the process where it does not know one.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
quick = "--xla_cpu_opt_preset=FAST_COMPILE"
if version("jaxlib").startswith("0.10."):
    quick = "--xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] += f" {quick} --xla_cpu_parallel_codegen_split_count=1"
# A busy machine must not fail tests.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

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


@pytest.fixture(scope="module", autouse=True)
def optimised(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files marked `slow` run large models, and compile with XLA's usual optimisations."""
    if request.node.get_closest_marker("slow") is None:
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    usual = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "true"
    jax.config.update("jax_disable_most_optimizations", usual)


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
