"""`python -m fairkv_jax.profile`: measures, learns and imports what a model's heads need."""

import sys
from collections.abc import Callable, Sequence

from fairkv_jax.profile import import_command, learn_command, measure_command

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "measure": measure_command.main,
    "learn": learn_command.main,
    "import": import_command.main,
}
_OVERVIEW = """\
commands, each with a --help of its own:
  measure   Measure the number of prompt tokens kept per KV head: a head profile. The default.
  learn     Learn from the model how much each KV head needs whole prompts: head scores.
  import    Convert published head scores and retention profiles.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs one command; errors are printed in one line to stderr, with exit status 1."""
    name, rest = "measure", arguments
    if arguments and arguments[0] in COMMANDS:
        name, rest = arguments[0], arguments[1:]
    elif "--help" in arguments or "-h" in arguments:
        print(_OVERVIEW)
    try:
        COMMANDS[name](rest)
    except (ValueError, OSError) as error:
        print(f"fairkv_jax.profile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
