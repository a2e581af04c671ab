"""Writes the tables of docs/server.md from the code: `python -m fairkv_jax.serve.reference`."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairkv_jax.serve import unsupported
from fairkv_jax.serve.app import create_app
from fairkv_jax.serve.body import Body
from fairkv_jax.serve.messages import Message
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.output_format import ResponseFormat, StructuredOutputs
from fairkv_jax.serve.prefixes import PrefixBody
from fairkv_jax.serve.protocol import ChatBody, CompletionBody, GenerationBody, StreamOptions
from fairkv_jax.serve.service import Service
from fairkv_jax.serve.tokenization import DetokenizeBody, TokenizeBody

BEGIN = "<!-- reference: written by `make server-reference` from the lists in fairkv_jax/ -->"
END = "<!-- end of the reference -->"

BODIES: Mapping[str, type[Body]] = {
    "Completions and chat completions": GenerationBody,
    "POST /v1/completions": CompletionBody,
    "POST /v1/chat/completions": ChatBody,
    "Messages of a conversation": Message,
    "`response_format`": ResponseFormat,
    "`structured_outputs`": StructuredOutputs,
    "`stream_options`": StreamOptions,
    "POST /v1/prefixes": PrefixBody,
    "POST /tokenize": TokenizeBody,
    "POST /detokenize": DetokenizeBody,
}
"""Headings of the tables and the bodies whose fields they show."""


def with_reference(page: str) -> str:
    """Returns the page with the current tables between its markers.

    Raises:
        ValueError: the page does not have both markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r} around the tables")
    return f"{before}{begin}\n\n{_reference()}\n\n{end}{after}"


def _reference() -> str:
    parts = [f"## Routes\n\n{_routes()}", "## Fields that are served"]
    for heading, body in BODIES.items():
        shared = GenerationBody if issubclass(body, GenerationBody) else None
        named = "" if body is GenerationBody or shared is None else "Besides the fields above:\n\n"
        parts.append(f"### {heading}\n\n{named}{_served(body, shared)}")
    parts.append("## Fields that are refused")
    for heading, fields in _refused():
        parts.append(f"### {heading}\n\n{_refused_table(fields)}")
    parts.append(
        "## Fields without effect\n\nThey are accepted, and cannot change the answer.\n\n"
        + _table("field", "meaning", unsupported.WITHOUT_EFFECT.items())
    )
    parts.append(
        "## Other APIs\n\nTheir paths, and all below them, are refused with HTTP 400.\n\n"
        + _table("path", "reason", unsupported.PATHS.items())
    )
    return "\n\n".join(parts)


def _routes() -> str:
    engine: Any = None  # routes are described without being called
    app = create_app(Service(engine, ServerOptions(), Metrics()))
    lines = ["| route | what it does |", "|---|---|"]
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            about = operation.get("description") or operation["summary"]
            lines.append(f"| `{method.upper()} {path}` | {about.splitlines()[0]} |")
    return "\n".join(lines)


def _served(body: type[Body], shared: type[Body] | None) -> str:
    schema = body.model_json_schema()
    lines = ["| field | type | meaning |", "|---|---|---|"]
    known = set() if shared is None or shared is body else set(shared.model_fields)
    for name, info in body.model_fields.items():
        if name not in known:
            key = info.alias or name
            about = " ".join((info.description or "").split())
            lines.append(f"| `{key}` | {_type(schema['properties'][key])} | {about} |")
    return "\n".join(lines)


def _type(schema: dict[str, Any]) -> str:
    """Returns a JSON schema's type in words, with its limits."""
    if "anyOf" in schema:
        kinds = [_type(each) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        return "object"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        most = f" ({schema['maxItems']} at most)" if "maxItems" in schema else ""
        return f"list of {_type(schema.get('items', {}))}{most}"
    kind = {"string": "text", "boolean": "true or false"}.get(schema.get("type", ""))
    return (kind or schema.get("type", "any")) + _limits(schema)


def _limits(schema: dict[str, Any]) -> str:
    below = f", below {schema['exclusiveMaximum']}" if "exclusiveMaximum" in schema else ""
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    if lowest is None and highest is None:
        return below
    if highest is None:
        return f", at least {lowest}{below}"
    return f", at most {highest}" if lowest is None else f", {lowest} to {highest}"


def _refused() -> list[tuple[str, Mapping[str, unsupported.Refused]]]:
    shared = unsupported.GENERATION

    def further(fields: Mapping[str, unsupported.Refused]) -> Mapping[str, unsupported.Refused]:
        return {name: about for name, about in fields.items() if name not in shared}

    return [
        ("Completions and chat completions", shared),
        ("Only completions", further(unsupported.COMPLETION)),
        ("Only chat completions", further(unsupported.CHAT)),
        ("Messages of a conversation", unsupported.MESSAGE),
        ("`structured_outputs`", unsupported.STRUCTURED_OUTPUTS),
        ("POST /tokenize and POST /v1/prefixes", unsupported.TEMPLATE),
    ]


def _refused_table(fields: Mapping[str, unsupported.Refused]) -> str:
    lines = ["| field | reason | values without effect, which are accepted |", "|---|---|---|"]
    for name, about in sorted(fields.items()):
        neutral = ", ".join(f"`{value!r}`" for value in about.neutral)
        neutral = neutral.replace("True", "true").replace("False", "false").replace("'", '"')
        lines.append(f"| `{name}` | {about.reason} | {neutral} |")
    return "\n".join(lines)


def _table(first: str, second: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {first} | {second} |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {text} |" for name, text in sorted(rows))])


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/server.md")
    path.write_text(with_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
