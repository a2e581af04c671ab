"""The server's command line. Options that vLLM also has carry vLLM's names."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fairkv_jax.command_line import as_flag, help_page, read_flags, string_list
from fairkv_jax.config import ENGINE_OPTIONS, POLICIES, takes_budget
from fairkv_jax.hosts.options import HOST_OPTIONS, HostOptions, host_options
from fairkv_jax.options import Option
from fairkv_jax.serve.options import API_KEY_VARIABLE, SERVER_OPTIONS, ServerOptions
from fairkv_jax.serve.tool_calls import TOOL_PARSERS

PROGRAM = "python -m fairkv_jax.serve"
DEFAULT_BUDGET = 1024
DEFAULT_CPU_DEVICES = 2
SERVER_DEFAULTS: dict[str, tuple[Any, str]] = {
    "kv_policy": ("ada_snapkv", ""),
    "kv_budget": (None, f"{DEFAULT_BUDGET}, unless kv_ratio is given"),
    "tensor_parallel_size": (None, f"all GPUs, or {DEFAULT_CPU_DEVICES} devices on the CPU"),
}
"""Engine options whose default differs in the server: the default and its description."""


@dataclass(frozen=True)
class Options:
    """The options given on the command line."""

    engine: dict[str, Any]
    """Engine options by name; for missing ones the engine uses its own defaults."""
    server: ServerOptions
    hosts: HostOptions = field(default_factory=HostOptions)

    @property
    def cpu_devices(self) -> int:
        """Number of virtual devices that JAX makes of the CPU if there is no accelerator.

        Several hosts divide the devices among them.
        """
        num_devices = self.engine.get("tensor_parallel_size", DEFAULT_CPU_DEVICES)
        return max(1, num_devices // self.hosts.num_hosts)


def served_option(option: Option) -> Option:
    """Returns an engine option with the server's own default, if it has one."""
    if option.name not in SERVER_DEFAULTS:
        return option
    default, text = SERVER_DEFAULTS[option.name]
    return replace(option, default=default, default_text=text)


FLAGS = (*map(served_option, ENGINE_OPTIONS), *HOST_OPTIONS, *SERVER_OPTIONS)


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Reads the arguments that follow the program's name.

    Raises:
        SystemExit: after `--help`, or with a message that names the wrong argument.
    """
    try:
        given, rest = read_flags(argv, FLAGS)
        if given["help"]:
            print(help_page(f"usage: {PROGRAM} [--option value ...]", FLAGS))
            raise SystemExit(0)
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}: options begin with --")
        hosts = host_options(given, environ)
        return Options(_engine_options(given), _server_options(given, environ), hosts)
    except ValueError as error:
        raise SystemExit(f"{PROGRAM}: {error}. --help lists the options.") from error


def _engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the engine options that were given or have a default here."""
    names = [option.name for option in ENGINE_OPTIONS]
    options = {name: given[name] for name in names if given[name] is not None}
    allocator = options.get("kv_allocator") or POLICIES[options["kv_policy"]][1]
    if takes_budget(allocator) and "kv_ratio" not in options:
        options.setdefault("kv_budget", DEFAULT_BUDGET)
    if options.get("tensor_parallel_size", 1) < 1:
        raise ValueError(
            f"--tensor-parallel-size must be at least 1, got {options['tensor_parallel_size']}"
        )
    return options


def _server_options(given: dict[str, Any], environ: Mapping[str, str]) -> ServerOptions:
    values: dict[str, Any] = {
        option.field: string_list(option.name, given[option.name])
        if option.type is tuple
        else given[option.name]
        for option in SERVER_OPTIONS
    }
    values["api_keys"] += string_list(API_KEY_VARIABLE, environ.get(API_KEY_VARIABLE, ""))
    values["compilation_cache_dir"] = os.path.expanduser(values["compilation_cache_dir"])
    options = ServerOptions(**values)
    if (options.ssl_keyfile is None) != (options.ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile must be given together")
    if options.enable_auto_tool_choice and options.tool_call_parser is None:
        raise ValueError(
            "--enable-auto-tool-choice needs --tool-call-parser, which is one of "
            f"{', '.join(TOOL_PARSERS)}"
        )
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be between 0 and 65535, got {options.port}")
    for name, low in (
        ("max_num_queued_reqs", 0),
        ("max_request_bytes", 1),
        ("shutdown_timeout", 0),
        ("stall_timeout", 1),
        ("max_connections", 1),
        ("request_read_timeout", 1),
        ("response_write_timeout", 1),
        ("max_num_queued_reqs_per_key", 1),
        ("max_queue_wait", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ValueError(
                f"{as_flag(name)} must be at least {low}, got {getattr(options, name)}"
            )
    return options
