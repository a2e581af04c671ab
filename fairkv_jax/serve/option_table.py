"""Writes the table of engine options into docs/reference/options.md.

`make option-table` does so; a test fails if the table is out of date.
"""

import sys
from pathlib import Path

from fairkv_jax.config import ENGINE_OPTIONS
from fairkv_jax.options import Option, by_group, help_with_choices
from fairkv_jax.serve.flags import served_option

BEGIN = "<!-- options: written by `make option-table` from the declarations in fairkv_jax/ -->"
END = "<!-- end of options -->"
PAGE = Path("docs/reference/options.md")
"""The page with the table, relative to the root of the repository."""


def with_table(page: str) -> str:
    """Returns the page with the current table between its markers.

    Raises:
        ValueError: the page does not have both markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"the page needs the lines {BEGIN!r} and {END!r} around the table, as {PAGE} has"
        )
    return f"{before}{begin}\n{_table()}\n{end}{after}"


def _table() -> str:
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for group, options in by_group(ENGINE_OPTIONS).items():
        lines.append(f"| **{group}** | | |")
        for option in options:
            text = help_with_choices(option)
            if option.old_name:
                text += f" Deprecated name: `{option.old_name}`."
            lines.append(f"| `{option.name}` | {_default(option)} | {text} |")
    return "\n".join(lines)


def _default(option: Option) -> str:
    """Returns the default of `LLM`, and that of the server if it differs."""
    served = served_option(option)
    own = _value(option)
    return own if served is option else "; ".join(filter(None, [own, f"server: {_value(served)}"]))


def _value(option: Option) -> str:
    if option.default_text or not option.shown_default:
        return option.default_text
    return f"`{option.shown_default}`"


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
