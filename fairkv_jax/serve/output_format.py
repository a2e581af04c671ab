"""Fields of requests that say what the output must match."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fairkv_jax.serve.body import Body
from fairkv_jax.serve.unsupported import STRUCTURED_OUTPUTS


class JsonSchema(Body):
    """A named JSON schema; the name is ignored."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


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
            return {"json_object": True}
        return {"json": self.json_schema.schema_} if self.json_schema else {}


class StructuredOutputs(Body):
    """vLLM's field that constrains the output; exactly one member is set."""

    REFUSED = STRUCTURED_OUTPUTS
    PATH = "structured_outputs"

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def constraint(self) -> dict[str, Any]:
        """Returns the arguments of `StructuredOutputsParams`."""
        names = ("regex", "choice", "grammar", "json_object")
        return {"json": self.json_} | {name: getattr(self, name) for name in names}
