"""`fairkv COMMAND` runs `python -m fairkv_jax.COMMAND`; so does `python -m fairkv_jax COMMAND`."""

import runpy
import sys

COMMANDS = {
    "serve": "start the OpenAI-compatible server",
    "chat": "talk to a server in the terminal",
    "plan": "assign KV heads to devices",
    "profile": "measure head profiles, learn or import head scores",
    "evaluate": "measure what compression costs in quality",
    "checkpoint": "fetch, convert or inspect a model",
    "replay": "execute a schedule log again",
    "aot": "compile the steps for GPUs, without a GPU",
}
USAGE = "\n".join(
    [
        "usage: fairkv COMMAND [--option value ...]",
        "",
        *(f"  {name:<11} {text}" for name, text in COMMANDS.items()),
        "",
        "fairkv COMMAND --help lists the options of a command.",
    ]
)


def main() -> None:
    """Runs the command that the first argument names.

    Raises:
        SystemExit: with the status of the command.
    """
    name, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("--help", "-h"):
        print(USAGE)
        return
    if name not in COMMANDS:
        sys.exit(f"fairkv: unknown command {name!r}: use one of {', '.join(COMMANDS)}")
    sys.argv = [f"fairkv {name}", *rest]
    runpy.run_module(f"fairkv_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
