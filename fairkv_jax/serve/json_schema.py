"""JSON schemas in requests: whether they have the form of one, and how they are changed for use."""

from collections.abc import Iterator
from typing import Any

MAX_SCHEMA_DEPTH = 64
_SHOWN_CHARACTERS = 100

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_SCHEMA_MEMBERS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LIST_MEMBERS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_MEMBERS = ("properties", "patternProperties", "$defs", "definitions")
"""Members of a JSON schema that are a schema, a list of schemas, and schemas by name."""
_CLOSING_MEMBERS = ("additionalProperties", "unevaluatedProperties", "patternProperties")


def check_schema(schema: Any) -> None:
    """Checks the form of a JSON schema, which is compiled only if it constrains an output.

    Raises:
        ValueError: it is not a schema, or nested too deeply.
    """
    _check_depth(schema)
    schemas = [schema]
    while schemas:
        schema = schemas.pop()
        if isinstance(schema, bool):
            continue
        for fault in _faults(schema):
            raise ValueError(fault)
        schemas += [inner for _, inner in _members(schema)]


def closed(schema: Any) -> Any:
    """Returns a schema whose objects have only the members that it names, unless it allows others.

    vLLM does so by default. JSON Schema itself allows any other members, with which small models go
    on and on. Schemas with `allOf` stay as they are, because its parts describe the same object.
    """
    return schema if _uses_all_of(schema) else _closed(schema)


def moved(schema: Any, place: str) -> Any:
    """Returns a schema whose references to itself begin at another place than the root."""
    if isinstance(schema, list):
        return [moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        result["$ref"] = place + reference[1:]
    return result


def shown(value: Any) -> str:
    """Returns a value as an error shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _members(schema: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the schemas inside a schema, each with the keys that lead to it."""
    for name in _SCHEMA_MEMBERS:
        if name in schema and not isinstance(schema[name], list):  # `items` once was a list
            yield (name,), schema[name]
    for name in _LIST_MEMBERS:
        for index, each in enumerate(schema.get(name, ())):
            yield (name, index), each
    for name in _NAMED_MEMBERS:
        for key, each in schema.get(name, {}).items():
            yield (name, key), each


def _uses_all_of(schema: Any) -> bool:
    schemas = [schema]
    while schemas:
        schema = schemas.pop()
        if isinstance(schema, dict):
            if "allOf" in schema:
                return True
            schemas += [inner for _, inner in _members(schema)]
    return False


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for (name, *inner), member in _members(schema):
        if not inner:
            result[name] = _closed(member)
            continue
        if result[name] is schema[name]:
            result[name] = schema[name].copy()
        result[name][inner[0]] = _closed(member)
    if "properties" in schema and not any(name in schema for name in _CLOSING_MEMBERS):
        result["additionalProperties"] = False
    return result


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep: use $defs")
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict | list):
                inside.extend(each.values() if isinstance(each, dict) else each)
        level = inside


def _faults(schema: Any) -> Iterator[str]:
    """Yields what is wrong with one schema, without those inside it."""
    if not isinstance(schema, dict):
        yield f"{shown(schema)} stands where a schema must be, which is an object"
        return
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            yield f"the type {shown(kind)} is none of {', '.join(_TYPES)}"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        yield f"required must be a list of names, got {shown(required)}"
    for names, form, words in (
        (("enum", *_LIST_MEMBERS), list, "a list"),
        (_NAMED_MEMBERS, dict, "an object"),
    ):
        for name in names:
            if not isinstance(schema.get(name, form()), form):
                yield f"{name} must be {words}, got {shown(schema[name])}"
