"""Command lines: absl flags that derive from declared options, and how programs end.

Dashes and underscores in the name of a flag are the same.
"""

import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from absl import flags

from fairkv_jax.config import ENGINE_OPTIONS
from fairkv_jax.options import (
    Option,
    by_group,
    check_given_once,
    deprecation,
    help_with_default,
)

# A flag belongs to the module that calls `define_flag`, not to this one.
flags.disclaim_key_flags()

logger = logging.getLogger(__name__)

ABORTED = 130
"""Exit status after a second signal: 128 + SIGINT."""
_CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"
_DECLARED = object()


def define_flag(
    option: Option,
    *,
    default: Any = _DECLARED,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> flags.FlagHolder[Any]:
    """Defines the absl flag of an option.

    Args:
        default: replaces the default of the option.
    """
    value: Any = option.default if default is _DECLARED else default
    text = option.help
    if value is None and option.default_text:
        text += f" Default: {option.default_text}."
    if option.choices:
        choices = list(option.choices)
        return flags.DEFINE_enum(option.name, value, choices, text, flag_values=flag_values)
    define: Any = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple: flags.DEFINE_string,  # read by `string_list`
    }[option.type]
    if option.type is tuple:
        value = ",".join(value or ())
    return define(option.name, value, text, flag_values=flag_values)


def engine_flag(name: str, *, default: Any = _DECLARED) -> flags.FlagHolder[Any]:
    """Defines the flag of an engine option in absl's global registry; see `define_flag`."""
    return define_flag(*engine_options(name), default=default)


def engine_options(*names: str) -> tuple[Option, ...]:
    """Returns the engine options of these names, in their order."""
    by_name = {option.name: option for option in ENGINE_OPTIONS}
    return tuple(by_name[name] for name in names)


def read_flags(
    arguments: Sequence[str], options: Sequence[Option]
) -> tuple[dict[str, Any], list[str]]:
    """Reads the arguments that follow a program's name.

    The flags live in a registry of their own, because absl's global one contains every library's.

    Returns:
        The values of all options by name, with `help` (bool) for --help or -h, and the arguments
        that are not flags.

    Raises:
        ValueError: a flag is unknown, or its value has the wrong type.
    """
    values = flags.FlagValues()
    for option in options:
        define_flag(option, flag_values=values)
    flags.DEFINE_boolean("help", False, "Print this page.", short_name="h", flag_values=values)
    try:
        rest = values(["program", *normalise(arguments, options)])[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    return values.flag_values_dict(), rest


def help_page(usage: str, options: Iterable[Option], width: int = 100) -> str:
    """Returns a help page: the usage, and all options by group."""
    lines = [usage]
    for group, members in by_group(options).items():
        lines += ["", f"{group}:"]
        for option in members:
            lines += textwrap.wrap(
                help_with_default(option),
                width,
                initial_indent=f"  {as_flag(option.name):<26} ",
                subsequent_indent=" " * 29,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def make_cpu_devices(num_devices: int) -> None:
    """Makes JAX split the CPU into devices, unless the user has set how many there are.

    It has no effect on GPUs, and none when JAX has started.
    """
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if _CPU_DEVICES_FLAG not in xla_flags:
        os.environ["XLA_FLAGS"] = f"{xla_flags} {_CPU_DEVICES_FLAG}={num_devices}".strip()


def with_underscores(argument: str) -> str:
    """Returns `--kv-budget=256` as `--kv_budget=256`; values and other words are unchanged."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def normalise(arguments: Sequence[str], options: Iterable[Option]) -> list[str]:
    """Returns the arguments as absl reads them, with new names in place of deprecated ones.

    `--kv-pool-first` becomes `--kv_pool_first`, and `--no-kv-pool-first` becomes
    `--nokv_pool_first`. A deprecated name is logged as a warning.

    Raises:
        ValueError: an option is given under its deprecated name and under its new one.
    """
    options = list(options)
    renamed = {option.old_name: option.name for option in options if option.old_name}
    switches = {option.name for option in options if option.type is bool}
    words = [with_underscores(argument) for argument in arguments]
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    result = []
    for word in words:
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and name in renamed:
            old, new = as_flag(name), as_flag(renamed[name])
            check_given_once(old, new, map(as_flag, given))
            logger.warning("%s", deprecation(old, new))
            word = f"--{renamed[name]}{equals}{value}"
        elif word.startswith("--no_") and name.removeprefix("no_") in switches:
            word = f"--no{name.removeprefix('no_')}{equals}{value}"
        result.append(word)
    return result


def as_flag(name: str) -> str:
    """Returns the flag of an option as users write it: `--kv-budget`."""
    return "--" + name.replace("_", "-")


def string_list(name: str, text: str) -> tuple[str, ...]:
    """Reads a list of strings, separated by commas or, as in vLLM, in JSON.

    Raises:
        ValueError: the JSON is not a list of strings.
    """
    text = text.strip()
    if not text.startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    values: list[Any] = [None]
    with suppress(ValueError):
        values = json.loads(text)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{as_flag(name)} must be a list of strings, got {text}")
    return tuple(values)


def exit_now(status: int) -> NoReturn:
    """Exits without waiting for other threads, which cannot be interrupted inside XLA."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
