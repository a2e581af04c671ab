"""The command line: vLLM's names where vLLM has one; dashes and underscores are the same."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from absl import flags

from fairkv_jax.config import FLOORS, POOLS, QUANTIZATIONS, EngineConfig, KVConfig
from fairkv_jax.serve.options import ServerOptions

PROGRAM = "python -m fairkv_jax.serve"
DEFAULT_BUDGET = 1024
DEFAULT_CPU_DEVICES = 2
DEFAULT_CACHE = "~/.cache/fairkv_jax/compiled"
API_KEY_VARIABLE = "FAIRKV_API_KEY"


class _Flag(NamedTuple):
    name: str
    kind: type | tuple[str, ...]
    """A type, `list` for comma-separated strings, or the choices."""
    default: Any
    """None leaves it to the engine."""
    help: str


_ENGINE_FLAGS = {
    "model": (
        _Flag("model", str, None, "a folder, a file or OWNER/MODEL of the Hub (default: the demo)"),
        _Flag("dtype", str, "auto", "of weights and cache; auto: float32 on CPU, else bfloat16"),
        _Flag("quantization", QUANTIZATIONS, None, "of the weights; left out: as --dtype says"),
        _Flag(
            "max_model_len", int, None, "most tokens of prompt and output (default: the model's)"
        ),
        _Flag("seed", int, EngineConfig.seed, "for the requests that bring none"),
    ),
    "devices and memory": (
        _Flag("tensor_parallel_size", int, None, "devices (default: all GPUs, or 2 on the CPU)"),
        _Flag(
            "head_plan", str, "fair_copying", "static, best_effort, fair_copying, or a plan's file"
        ),
        _Flag(
            "max_extra_replicas",
            int,
            None,
            "maximum replicas per layer beyond one per head (default: limited by the slots only)",
        ),
        _Flag("max_num_seqs", int, EngineConfig.max_num_seqs, "requests that run at a time"),
        _Flag("gpu_memory_utilization", float, 0.9, "part of a GPU for weights and KV cache"),
        _Flag("kv_cache_memory_bytes", int, None, "instead of it, of the KV cache on all devices"),
        _Flag("page_size", int, EngineConfig.page_size, "tokens per page of it"),
        _Flag("prefill_block", int, None, "prompt tokens between two steps (default: by device)"),
        _Flag(
            "attention_backend",
            str,
            EngineConfig.attention_backend,
            "of decoding: reference, triton, mosaic; auto: by device",
        ),
    ),
    "compression of the KV cache": (
        _Flag(
            "kv_policy",
            str,
            "ada_snapkv",
            "full, streaming_llm, [ada_]snapkv, pyramidkv, head_budgets",
        ),
        _Flag("kv_budget", int, None, f"kept tokens a head on average (default: {DEFAULT_BUDGET})"),
        _Flag("kv_ratio", float, None, "instead of it, the fraction removed of each prompt"),
        _Flag("kv_window", int, KVConfig.window, "last tokens: always kept, they score the others"),
        _Flag("kv_pool", POOLS, KVConfig.pool, "pooling of the scores along the prompt"),
        _Flag("kv_kernel", int, KVConfig.kernel, "width of the pooling, odd"),
        _Flag("kv_pool_first", bool, KVConfig.pool_first, "pool before the mean over query heads"),
        _Flag("kv_floor", FLOORS, KVConfig.floor, "how ada_snapkv protects weak heads"),
        _Flag("kv_alpha", float, KVConfig.alpha, "protected fraction of a head's budget"),
        _Flag("kv_head_budgets", str, None, "for kv_policy head_budgets: a profile's JSON file"),
    ),
}
_PROCESS_FLAGS = {
    "compiling": (
        _Flag("compilation_cache_dir", str, DEFAULT_CACHE, "compiled programs; empty keeps none"),
    ),
}
_SERVER_FLAGS = {
    "server": (
        _Flag("host", str, ServerOptions.host, "address to listen on"),
        _Flag("port", int, ServerOptions.port, "0 takes a free one, which the log names"),
        _Flag("served_model_name", list, [], "names that clients may ask for, with commas"),
        _Flag("api_key", list, [], f"keys that open /v1, with commas; also ${API_KEY_VARIABLE}"),
        _Flag(
            "ssl_keyfile", str, None, "PEM file of the key; with the certificate, HTTPS is served"
        ),
        _Flag("ssl_certfile", str, None, "PEM file of the certificate"),
        _Flag("max_num_queued_reqs", int, ServerOptions.max_num_queued_reqs, "503 beyond"),
        _Flag("max_request_bytes", int, ServerOptions.max_request_bytes, "413 beyond"),
        _Flag("shutdown_timeout", int, ServerOptions.shutdown_timeout, "seconds after SIGTERM"),
        _Flag("log_level", ("debug", "info", "warning", "error"), "info", "least level logged"),
        _Flag("enable_log_requests", bool, False, "prompts too, in the access log"),
    ),
    "pages of other origins (CORS); lists with commas, or in JSON": (
        _Flag("allowed_origins", str, "", "that may read answers, or *; none by default"),
        _Flag("allowed_methods", str, "*", "that they may use"),
        _Flag("allowed_headers", str, "*", "that they may send"),
        _Flag("allow_credentials", bool, False, "whether they may send cookies"),
    ),
}


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    engine: dict[str, Any]
    """Options of the engine by name; those that are missing have the engine's own defaults."""
    server: ServerOptions
    compilation_cache_dir: str
    """A folder for what has been compiled; empty: none."""

    @property
    def cpu_devices(self) -> int:
        """How many devices JAX shall make of the CPU, where there is no accelerator."""
        return self.engine.get("tensor_parallel_size", DEFAULT_CPU_DEVICES)


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Read the arguments, without the program's name.

    Raises:
        SystemExit: after `--help`, or with a sentence that says which argument is wrong.
    """
    values = _define()
    try:
        rest = values([PROGRAM, *_normalise(argv)])[1:]
        given = values.flag_values_dict()
        if given["help"]:
            print(_help())
            raise SystemExit(0)
        if rest:
            raise ValueError(f"{rest[0]!r} is not understood: options begin with --")
        cache = os.path.expanduser(given["compilation_cache_dir"])
        return Options(_engine_options(given), _server_options(given, environ), cache)
    except (flags.Error, ValueError) as error:
        raise SystemExit(f"{PROGRAM}: {error}. --help lists the options.") from error


def _define() -> flags.FlagValues:
    """The flags, in a value of their own: absl's global one lists those of every library."""
    values = flags.FlagValues()
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
        list: flags.DEFINE_list,
    }
    for _, flag in _all_flags():
        if isinstance(flag.kind, tuple):
            flags.DEFINE_enum(flag.name, flag.default, flag.kind, flag.help, flag_values=values)
        else:
            define[flag.kind](flag.name, flag.default, flag.help, flag_values=values)
    flags.DEFINE_boolean("help", False, "print this page", short_name="h", flag_values=values)
    return values


def _all_flags() -> Iterator[tuple[str, _Flag]]:
    """Every flag with its group."""
    for group, members in (_ENGINE_FLAGS | _PROCESS_FLAGS | _SERVER_FLAGS).items():
        for flag in members:
            yield group, flag


def _normalise(argv: Sequence[str]) -> list[str]:
    """`--kv-pool-first` as `--kv_pool_first`, and `--no-kv-pool-first` as absl's `--nokv_...`."""
    switches = {flag.name for _, flag in _all_flags() if flag.kind is bool}
    arguments = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name.removeprefix("no_") in switches:
                name = name.replace("no_", "no", 1) if name.startswith("no_") else name
            argument = f"--{name}{equals}{value}"
        arguments.append(argument)
    return arguments


def _engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """Those that were given or have a default here."""
    names = [flag.name for members in _ENGINE_FLAGS.values() for flag in members]
    options = {name: given[name] for name in names if given[name] is not None}
    takes_budget = options["kv_policy"] not in ("full", "head_budgets")
    if takes_budget and "kv_ratio" not in options:
        options.setdefault("kv_budget", DEFAULT_BUDGET)
    if options.get("tensor_parallel_size", 1) < 1:
        raise ValueError(
            f"--tensor-parallel-size must be at least 1, got {options['tensor_parallel_size']}"
        )
    return options


def _server_options(given: dict[str, Any], environ: Mapping[str, str]) -> ServerOptions:
    more_keys = environ.get(API_KEY_VARIABLE, "").split(",")
    keys = (key.strip() for key in [*given["api_key"], *more_keys])
    options = ServerOptions(
        host=given["host"],
        port=given["port"],
        served_model_names=tuple(given["served_model_name"]),
        ssl_keyfile=given["ssl_keyfile"],
        ssl_certfile=given["ssl_certfile"],
        allowed_origins=_strings("allowed_origins", given),
        allowed_methods=_strings("allowed_methods", given),
        allowed_headers=_strings("allowed_headers", given),
        allow_credentials=given["allow_credentials"],
        enable_log_requests=given["enable_log_requests"],
        api_keys=tuple(key for key in keys if key),
        max_num_queued_reqs=given["max_num_queued_reqs"],
        max_request_bytes=given["max_request_bytes"],
        shutdown_timeout=given["shutdown_timeout"],
        log_level=given["log_level"],
    )
    if (options.ssl_keyfile is None) != (options.ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile go together: give both")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must lie between 0 and 65535, got {options.port}")
    for name, low in (
        ("max_num_queued_reqs", 0),
        ("max_request_bytes", 1),
        ("shutdown_timeout", 0),
    ):
        if getattr(options, name) < low:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least {low}, got {getattr(options, name)}")
    return options


def _strings(name: str, given: dict[str, Any]) -> tuple[str, ...]:
    """A list with commas, or one in JSON, which is how vLLM takes them."""
    text: str = given[name].strip()
    if not text.startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    values: list[Any] = [None]
    with suppress(ValueError):
        values = json.loads(text)
    if not all(isinstance(value, str) for value in values):
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} must be a list of strings, got {text}")
    return tuple(values)


def _help() -> str:
    """All options on one page, by group."""
    lines = [f"usage: {PROGRAM} [--option value ...]", ""]
    previous = None
    for group, flag in _all_flags():
        if group != previous:
            lines.append(f"{group}:")
            previous = group
        choices = f" ({', '.join(flag.kind)})" if isinstance(flag.kind, tuple) else ""
        shown = "" if flag.default in (None, [], "") else f" [{flag.default}]"
        name = "--" + flag.name.replace("_", "-")
        lines.append(f"  {name:<24} {flag.help}{choices}{shown}")
    return "\n".join(lines)
