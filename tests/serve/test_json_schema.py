"""What is changed in the schemas of requests, and what is not."""

import json
from typing import Any

import pytest

from fairkv_jax.serve.json_schema import check_schema, closed, moved

OPEN = {"type": "object", "properties": {"a": {}}}
CLOSED = {**OPEN, "additionalProperties": False}
REFERENCE = {"$ref": "#/$defs/d"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, CLOSED),
        ({"properties": {"properties": OPEN}}, None),
        ({"type": "object"}, {"type": "object"}),
        ({**OPEN, "additionalProperties": True}, {**OPEN, "additionalProperties": True}),
        (
            {**OPEN, "patternProperties": {"b": OPEN}},
            {**CLOSED, "patternProperties": {"b": CLOSED}},
        ),
        (
            {"patternProperties": {"b": {}}},
            {"patternProperties": {"b": {}}, "additionalProperties": False},
        ),
        (
            {"patternProperties": {"b": {}}, "additionalProperties": OPEN},
            {"patternProperties": {"b": {}}, "additionalProperties": CLOSED},
        ),
        ({"anyOf": [OPEN, True], "items": OPEN}, {"anyOf": [CLOSED, True], "items": CLOSED}),
        (
            {"$defs": {"d": OPEN}, "$ref": "#/$defs/d"},
            {"$defs": {"d": CLOSED}, "$ref": "#/$defs/d"},
        ),
        ({"const": OPEN, "enum": [OPEN]}, {"const": OPEN, "enum": [OPEN]}),
        ({"allOf": [OPEN, OPEN]}, {"allOf": [OPEN, OPEN]}),
        (False, False),
    ],
)
def test_objects_are_closed_unless_they_say_otherwise(schema, expected):
    if expected is None:
        expected = {"properties": {"properties": CLOSED}, "additionalProperties": False}
    before = repr(schema)
    assert closed(schema) == expected
    assert repr(schema) == before
    check_schema(schema)


def defining(definition: Any, **schema: Any) -> dict[str, Any]:
    return {"$defs": {"d": definition}, **schema}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            {"properties": {"x": {"allOf": [OPEN, {"required": ["a"]}]}, "y": OPEN}},
            {
                "properties": {"x": {"allOf": [OPEN, {"required": ["a"]}]}, "y": CLOSED},
                "additionalProperties": False,
            },
        ),
        (
            {"properties": {"x": OPEN}, "allOf": [{"properties": {"y": OPEN}}]},
            {"properties": {"x": CLOSED}, "allOf": [{"properties": {"y": CLOSED}}]},
        ),
        (
            {"allOf": [{"anyOf": [OPEN, {"$ref": "#/$defs/d"}]}, True], "$defs": {"d": OPEN}},
            {"allOf": [{"anyOf": [OPEN, {"$ref": "#/$defs/d"}]}, True], "$defs": {"d": OPEN}},
        ),
        # Older versions of pydantic write a reference beside a description so.
        (
            defining(OPEN, properties={"x": {"allOf": [REFERENCE], "title": "X"}}),
            defining(
                CLOSED,
                properties={"x": {"allOf": [REFERENCE], "title": "X"}},
                additionalProperties=False,
            ),
        ),
        (
            {"definitions": {"a/b c": OPEN}, "allOf": [{"$ref": "#/definitions/a~1b%20c"}, OPEN]},
            {"definitions": {"a/b c": OPEN}, "allOf": [{"$ref": "#/definitions/a~1b%20c"}, OPEN]},
        ),
        (
            {"anyOf": [OPEN, {"allOf": [{"$ref": "#/anyOf/2"}, {"$ref": "#"}]}, OPEN]},
            {"anyOf": [OPEN, {"allOf": [{"$ref": "#/anyOf/2"}, {"$ref": "#"}]}, OPEN]},
        ),
        (
            {"allOf": [{"$ref": f"#/allOf/{'9' * 5000}"}, OPEN]},
            {"allOf": [{"$ref": f"#/allOf/{'9' * 5000}"}, OPEN]},
        ),
        (
            {"const": {"anyOf": 5}, "allOf": [{"$ref": "#/const"}, {"$ref": "#/no/9"}]},
            {"const": {"anyOf": 5}, "allOf": [{"$ref": "#/const"}, {"$ref": "#/no/9"}]},
        ),
    ],
)
def test_only_objects_of_several_parts_stay_open(schema: Any, expected: Any):
    schema = json.loads(json.dumps(schema))  # so that no two schemas are one
    check_schema(schema)
    assert closed(schema) == expected


def test_references_move_with_their_schema():
    schema = {"$defs": {"d": {"$ref": "#"}}, "items": {"$ref": "#/$defs/d"}, "not": {"$ref": "u"}}
    assert moved(schema, "#/$defs/f") == {
        "$defs": {"d": {"$ref": "#/$defs/f"}},
        "items": {"$ref": "#/$defs/f/$defs/d"},
        "not": {"$ref": "u"},
    }
