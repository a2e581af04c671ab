"""JSON schemas in requests: whether they have the form of one, and how they are changed for use."""

from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_OBJECTS = 10_000
"""Objects of JSON in all schemas of a request, which the event loop goes through. OpenAI allows
5,000 properties."""
_SHOWN_CHARACTERS = 100

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_SCHEMA_MEMBERS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LIST_MEMBERS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_MEMBERS = ("properties", "patternProperties", "$defs", "definitions")
"""Members of a JSON schema that are a schema, a list of schemas, and schemas by name."""
_SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")
"""Members whose schemas describe the same value as the schema that they are in."""
_OBJECT_MEMBERS = ("properties", "patternProperties")
_CLOSING_MEMBERS = ("additionalProperties", "unevaluatedProperties")


def check_size(schemas: Iterable[Any]) -> None:
    """Checks that reading the schemas of a request takes a fraction of a second.

    Raises:
        ValueError: they are too large.
    """
    waiting, num_objects = list(schemas), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            num_objects += 1
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        if num_objects > MAX_SCHEMA_OBJECTS:
            raise ValueError(
                f"the JSON schemas consist of more than {MAX_SCHEMA_OBJECTS} objects: send "
                "smaller ones, or use $defs for what is repeated"
            )


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
    on and on. Objects that `allOf` describes in several parts stay open, because each part would
    exclude the members of the others; objects inside them are closed.
    """
    return _closed(schema, _parts(schema))


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


def _parts(root: Any) -> set[int]:
    """Returns the identities of the schemas that describe a part of an object."""
    parts: set[int] = set()
    seen: set[tuple[int, bool]] = set()
    schemas = [(root, False)]
    while schemas:
        schema, is_part = schemas.pop()
        if not isinstance(schema, dict) or (id(schema), is_part) in seen:
            continue
        seen.add((id(schema), is_part))
        if any(_faults(schema)):  # a reference may lead to what is no schema
            continue
        is_part = is_part or _has_parts(schema)
        if is_part:
            parts.add(id(schema))
            schemas.append((_target(root, schema.get("$ref")), True))
        for (name, *_), member in _members(schema):
            schemas.append((member, is_part and name in _SAME_VALUE))
    return parts


def _has_parts(schema: dict[str, Any]) -> bool:
    """Returns whether `allOf` has several parts of an object.

    Some clients write a reference as an `allOf` of one, to put a description or a default beside.
    """
    beside = {"$ref", *_OBJECT_MEMBERS, *_SAME_VALUE} - {"allOf"}
    return "allOf" in schema and (len(schema["allOf"]) > 1 or not beside.isdisjoint(schema))


def _target(root: Any, reference: Any) -> Any:
    """Returns what a reference inside the schema stands for; None if there is no such place."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place = root
    for key in unquote(reference[1:]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list):
            is_index = key.isdecimal() and len(key) <= len(str(len(place)))
            place = place[int(key)] if is_index and int(key) < len(place) else None
        else:
            place = place.get(key) if isinstance(place, dict) else None
    return place


def _closed(schema: Any, parts: set[int]) -> Any:
    """Closes all objects but those that the schemas of `parts` describe."""
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for (name, *inner), member in _members(schema):
        if not inner:
            result[name] = _closed(member, parts)
            continue
        if result[name] is schema[name]:
            result[name] = schema[name].copy()
        result[name][inner[0]] = _closed(member, parts)
    names_members = any(name in schema for name in _OBJECT_MEMBERS)
    is_said = any(name in schema for name in _CLOSING_MEMBERS)
    if names_members and not is_said and id(schema) not in parts:
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
