"""Start the server: `python -m fairkv_jax.serve --help`."""

import faulthandler
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fairkv_jax.command_line import make_cpu_devices
from fairkv_jax.engine.request import Request
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.serve.engine_protocol import Engine
from fairkv_jax.serve.flags import Options, parse

if TYPE_CHECKING:
    from fairkv_jax.hosts.leader import Leader

CACHE_BYTES = 2 << 30


def main() -> int:
    """Reads the flags, prepares the process for JAX, and serves."""
    options = parse(sys.argv[1:])
    logging.basicConfig(
        level=options.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    hide_missing_tpu()
    _prepare_jax(options)
    # These modules import JAX, which reads the environment variables set above.
    from fairkv_jax.serve.access import log_to_stdout
    from fairkv_jax.serve.compile_cache import complete_entries, replace_damaged_entries
    from fairkv_jax.serve.server import serve

    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        complete_entries(folder)
        replace_damaged_entries(folder)
    if options.hosts.num_hosts > 1:
        return _serve_with_hosts(options)
    log_to_stdout(options.server.log_level.upper())
    return serve(partial(_load, options), options.server)


def _serve_with_hosts(options: Options) -> int:
    """Leads the other hosts, or follows their leader."""
    try:
        from fairkv_jax.hosts.follower import follow
        from fairkv_jax.hosts.leader import Leader
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"--num-hosts needs the package {error.name}: pip install 'fairkv-jax[hosts]'"
        ) from error
    from fairkv_jax.serve.access import log_to_stdout
    from fairkv_jax.serve.server import serve

    hosts, step_timeout_s = options.hosts, options.server.stall_timeout
    if not hosts.is_leader:
        follow(hosts, step_timeout_s, options.engine)
    log_to_stdout(options.server.log_level.upper())
    leader = Leader(hosts, step_timeout_s)
    return serve(partial(_load, options, leader), options.server, leader)


def hide_missing_tpu() -> None:
    """Drops JAX's message that there is no TPU, which it logs at INFO on every other machine."""
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_not_missing_tpu)


def _is_not_missing_tpu(record: logging.LogRecord) -> bool:
    is_missing = record.getMessage().startswith("Unable to initialize backend 'tpu'")
    return record.levelno > logging.INFO or not is_missing


def _prepare_jax(options: Options) -> None:
    """Sets the environment variables that JAX reads, unless the user has set them.

    The CPU is split into virtual devices, which does not affect GPUs. Every compiled program is
    cached on disk, however small, so that the next start only reads it.
    """
    make_cpu_devices(options.cpu_devices)
    if options.server.compilation_cache_dir:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", options.server.compilation_cache_dir)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _load(options: Options, leader: "Leader | None" = None) -> Engine:
    """Builds the engine, by default on every device, and compiles all of its programs."""
    import jax

    from fairkv_jax.engine.build import build_engine

    with_hosts = {} if leader is None else _join(leader)
    engine = build_engine(
        **{"tensor_parallel_size": len(jax.devices()), **options.engine}, **with_hosts
    )
    engine.start_workers()
    config = engine.engine_config
    lengths = range(1, config.max_model_len)
    engine.warm_up(
        lengths,
        config.max_num_seqs,
        suffix_lengths=lengths if config.enable_prefix_caching else (),
        forks=True,
    )
    _rehearse(engine, config.max_num_seqs)
    return engine


def _join(leader: "Leader") -> dict[str, Any]:
    """Waits for the followers, and returns what `build_engine` takes for them."""
    from fairkv_jax.hosts.leading_runner import LeadingRunner

    leader.join()
    return {
        "memory_bytes": leader.least_memory_bytes(),
        "make_runner": partial(LeadingRunner, leader),
    }


def _rehearse(engine: Engine, rows: int) -> None:
    """Fills the batch row by row, so that remaining compilations and failures precede "ready"."""
    params = SamplingParams(max_tokens=rows + 1, ignore_eos=True, seed=0)
    _run(engine, [Request(f"rehearsal-{row}", [0], params) for row in range(rows)])
    if engine.engine_config.enable_prefix_caching:
        _run(engine, [Request("rehearsal", [0], caches_prefix=True)])
        (record,) = engine.prefixes.of_owner()
        _run(engine, [Request("rehearsal", [0], params, prefix_id=record.id)])
        engine.delete_prefix(record.id)


def _run(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.add_request(engine.validate(request))
    while engine.has_unfinished_requests():
        engine.step()


if __name__ == "__main__":
    faulthandler.enable()  # the weights are mapped files: one that is cut short ends the process
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
