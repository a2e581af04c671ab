"""What is changed in the schemas of requests, and what is not."""

import pytest

from fairkv_jax.serve.json_schema import check_schema, closed, moved

OPEN = {"type": "object", "properties": {"a": {}}}
CLOSED = {**OPEN, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (OPEN, CLOSED),
        ({"properties": {"properties": OPEN}}, None),
        ({"type": "object"}, {"type": "object"}),
        ({**OPEN, "additionalProperties": True}, {**OPEN, "additionalProperties": True}),
        ({**OPEN, "patternProperties": {"b": OPEN}}, {**OPEN, "patternProperties": {"b": CLOSED}}),
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


def test_references_move_with_their_schema():
    schema = {"$defs": {"d": {"$ref": "#"}}, "items": {"$ref": "#/$defs/d"}, "not": {"$ref": "u"}}
    assert moved(schema, "#/$defs/f") == {
        "$defs": {"d": {"$ref": "#/$defs/f"}},
        "items": {"$ref": "#/$defs/f/$defs/d"},
        "not": {"$ref": "u"},
    }
