"""Start the server: `python -m fairkv_jax.serve --help`."""

import logging
import os
import sys
from functools import partial

from fairkv_jax.serve.flags import Options, parse

CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"


def main() -> int:
    """Read the flags, prepare the process for JAX, serve."""
    options = parse(sys.argv[1:])
    logging.basicConfig(
        level=options.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    _split_cpu(options.cpu_devices)
    # Only now, as whatever imports JAX must find the environment that it reads.
    from fairkv_jax.serve.server import serve

    return serve(partial(_load, options), options.server)


def _split_cpu(devices: int) -> None:
    """Let JAX see so many CPU devices; it changes nothing where there are GPUs."""
    flags = os.environ.get("XLA_FLAGS", "")
    if CPU_DEVICES_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {CPU_DEVICES_FLAG}={devices}".strip()


def _load(options: Options):
    """The engine, on every device that there is unless fewer are asked for."""
    import jax

    from fairkv_jax.engine.llm_engine import LLMEngine

    return LLMEngine.from_options(**{"tensor_parallel_size": len(jax.devices()), **options.engine})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
