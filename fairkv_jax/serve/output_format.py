"""Fields of requests that say what the output must match.

As in vLLM, objects have only the members that their schema names, unless it allows others: JSON
Schema itself allows any, and small models go on and on with them. JSON is written without white
space, for the same reason.
"""

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from fairkv_jax.serve.body import Body
from fairkv_jax.serve.json_schema import check_schema, check_size, closed
from fairkv_jax.serve.unsupported import STRUCTURED_OUTPUTS


def schema_for_output(
    schema: str | dict[str, Any], *, is_closed: bool = True, is_compact: bool = True
) -> str | dict[str, Any]:
    """Returns the schema that the output follows.

    Args:
        is_closed: whether objects have only the members that are named, if nothing else is said.
        is_compact: whether white space is left out, if the schema's "x-guidance" does not say.

    What is not a schema stays as it is: the error in compiling it says why.

    Raises:
        ValueError: the schema is too large.
    """
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        return schema
    check_size([parsed])
    try:
        check_schema(parsed)
    except ValueError:
        return schema
    if not isinstance(parsed, dict):
        return schema
    compact = {"x-guidance": {"whitespace_flexible": False}} if is_compact else {}
    return compact | (closed(parsed) if is_closed else parsed)


ANY_OBJECT = schema_for_output({"type": "object"})


class JsonSchema(Body):
    """A named JSON schema; the name is ignored."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """False lets objects have members that the schema does not name, as JSON Schema has it."""


class ResponseFormat(Body):
    """OpenAI's field that asks for JSON output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_is_announced(self) -> "ResponseFormat":
        if self.type == "json_schema" and (
            not self.json_schema or self.json_schema.schema_ is None
        ):
            raise ValueError("the type json_schema needs json_schema with a name and a schema")
        return self

    @property
    def constraint(self) -> dict[str, Any]:
        """Returns the arguments of `StructuredOutputsParams`; empty for text."""
        if self.type == "json_object":
            return {"json": ANY_OBJECT}
        if self.json_schema is None or self.json_schema.schema_ is None:
            return {}
        is_closed = self.json_schema.strict is not False
        return {"json": schema_for_output(self.json_schema.schema_, is_closed=is_closed)}


class StructuredOutputs(Body):
    """vLLM's field that constrains the output; exactly one member is set."""

    REFUSED = STRUCTURED_OUTPUTS
    PATH = "structured_outputs"

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    """Whether JSON is written without white space. Default: yes."""
    disable_additional_properties: bool | None = None
    """Whether objects have only the members that the schema names. Default: yes, unless it allows
    others."""

    @property
    def constraint(self) -> dict[str, Any]:
        """Returns the arguments of `StructuredOutputsParams`."""
        names = ("regex", "choice", "grammar", "json_object")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        schema = self.json_
        if schema is None and self.json_object:
            schema, given["json_object"] = {"type": "object"}, None
        if schema is not None:
            given["json"] = schema_for_output(
                schema,
                is_closed=self.disable_additional_properties is not False,
                is_compact=self.disable_any_whitespace is not False,
            )
        return given
