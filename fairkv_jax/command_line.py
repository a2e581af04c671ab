"""Command lines: dashes and underscores in an option's name are the same."""


def with_underscores(argument: str) -> str:
    """`--kv-budget=256` as absl's `--kv_budget=256`; values and other words stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
