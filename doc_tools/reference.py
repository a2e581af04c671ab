"""Reference tables that are generated from the code whenever the site is built.

A page asks for one by a line `<!-- generated: NAME -->`.
"""

import re
import subprocess
import sys
from collections.abc import Callable

from prometheus_client.metrics_core import Metric

from fairkv_jax.hosts.options import HOST_OPTIONS
from fairkv_jax.options import Option, help_with_choices
from fairkv_jax.serve.instruments import Instruments
from fairkv_jax.serve.options import SERVER_OPTIONS

MARKER = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)


def with_generated(page: str) -> str:
    """Returns the page with every marker replaced by what it asks for.

    Raises:
        KeyError: a marker names nothing that can be generated.
    """
    return MARKER.sub(lambda found: _generate(found[1]), page)


def _generate(name: str) -> str:
    if name.startswith("help of "):
        return help_page(name.removeprefix("help of "))
    return TABLES[name]()


def help_page(command: str) -> str:
    """Returns what `python -m fairkv_jax.COMMAND --help` prints, as a block of code.

    Raises:
        RuntimeError: the command failed.
    """
    module, *subcommands = command.split()
    program = [sys.executable, "-m", f"fairkv_jax.{module}", *subcommands, "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    text = done.stdout.strip()
    if not text:  # absl's help ends with status 1
        raise RuntimeError(f"{' '.join(program[1:])} printed no help: {done.stderr.strip()}")
    # absl names the file that declares a flag by its absolute path.
    text = re.sub(r"^/\S*?(fairkv_jax/\S+):$", r"\1:", text, flags=re.MULTILINE)
    return f"```text\n{text}\n```"


def server_options() -> str:
    """Returns the table of the options that only the server has."""
    rows = [
        (f"`{option.name}`", _default(option), help_with_choices(option))
        for option in (*HOST_OPTIONS, *SERVER_OPTIONS)
    ]
    return _table(("option", "default", "meaning"), rows)


def _default(option: Option) -> str:
    if option.default_text or not option.shown_default:
        return option.default_text
    return f"`{option.shown_default}`"


def metrics() -> str:
    """Returns the table of the Prometheus metrics."""
    families: list[Metric] = list(Instruments().registry.collect())
    rows = [
        (f"`{family.name}`", family.type, family.documentation)
        for family in families
        if not family.name.startswith("process_")
    ]
    return _table(("metric", "type", "meaning"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


TABLES: dict[str, Callable[[], str]] = {
    "server options": server_options,
    "metrics": metrics,
}
