"""The tools of a request, and the JSON schemas that force an output to call them."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from fairkv_jax.serve.body import Body
from fairkv_jax.serve.json_schema import check_schema, check_size, closed, moved, shown

MAX_TOOLS = 128
"""OpenAI's limit."""
_MAX_NAME_CHARACTERS = 256
_AS_TEMPLATES_WRITE = {
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
}
"""Makes llguidance write JSON as chat templates do, so that a small model cannot go on and on with
white space."""


class Function(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=_MAX_NAME_CHARACTERS)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the type object; without it, the function has no parameters."""
    strict: bool | None = None
    """False lets the arguments have members that the schema does not name, as JSON Schema has
    it."""


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function

    def as_dict(self) -> dict[str, Any]:
        """Returns the tool as chat templates expect it, as the client has sent it."""
        return {"type": self.type, "function": self.function.model_dump(exclude_unset=True)}


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """Names the function that the model must call."""

    type: Literal["function"] = "function"
    function: FunctionName


class ToolList(Body):
    """The tools that a chat template writes into the prompt."""

    tools: list[Tool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    """Functions that the model may call."""

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        for name in names:
            if not name.isprintable():
                raise ValueError(f"the name {name!r} has characters that cannot be printed")
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} functions have the name {shown(name)}: give each its own"
                )
        check_size(tool.function.parameters for tool in tools or ())
        for tool in tools or ():
            if tool.function.parameters is not None:
                _check_parameters(tool.function.name, tool.function.parameters)
        return tools

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates expect them; None if there are none."""
        return [tool.as_dict() for tool in self.tools] if self.tools else None


class ToolOptions(ToolList):
    """The fields of chat completions that are about tools."""

    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Whether the model calls tools: not at all, as it decides, at least one of them, or the named
    one. Default: as it decides, if there are tools. It needs `--enable-auto-tool-choice`."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several tool calls. Default: yes."""

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _check_choice(cls, choice: Any, info: ValidationInfo) -> Any:
        if choice is None or (isinstance(choice, str) and choice == "none"):
            return choice
        name = _chosen_name(choice)
        if name is None and choice not in ("auto", "required"):
            raise ValueError(
                'it must be "none", "auto", "required" or {"type": "function", "function": '
                f'{{"name": "..."}}}}, got {shown(choice)}'
            )
        tools = info.data.get("tools")
        if "tools" in info.data and not tools:
            raise ValueError(f"{shown(name or choice)} needs tools: send tools, or leave it out")
        names = [tool.function.name for tool in tools or ()]
        if tools and name is not None and name not in names:
            known = shown(", ".join(names))
            raise ValueError(f"there is no function {shown(name)} in tools, which has {known}")
        return choice

    @property
    def finds_calls(self) -> bool:
        """Whether calls are to be looked for in what the model writes freely."""
        return bool(self.tools) and self.tool_choice in (None, "auto")

    @property
    def named_function(self) -> str | None:
        """The function that the model must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def calls_schema(self) -> dict[str, Any] | None:
        """The JSON schema of an output that must call tools; None if it need not."""
        if not self.tools:
            return None
        if self.tool_choice == "required":
            return required_schema(self.tools, is_parallel=self.parallel_tool_calls is not False)
        for tool in self.tools:
            if tool.function.name == self.named_function:
                return _AS_TEMPLATES_WRITE | _parameters(tool.function)
        return None


def required_schema(tools: Sequence[Tool], *, is_parallel: bool) -> dict[str, Any]:
    """Returns the schema of an array of calls, each [{"name": ..., "parameters": ...}].

    The parameters of each function are a definition of their own, so that references in them can
    be kept: one to "#/$defs/City" becomes one to "#/$defs/function0/$defs/City".
    """
    definitions: dict[str, Any] = {}
    calls = []
    for index, tool in enumerate(tools):
        place = f"function{index}"
        definitions[place] = moved(_parameters(tool.function), f"#/$defs/{place}")
        members = {
            "name": {"const": tool.function.name},
            "parameters": {"$ref": f"#/$defs/{place}"},
        }
        calls.append(
            {
                "type": "object",
                "properties": members,
                "required": list(members),
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return _AS_TEMPLATES_WRITE | schema | ({} if is_parallel else {"maxItems": 1})


def _parameters(function: Function) -> dict[str, Any]:
    if function.parameters:
        is_closed = function.strict is not False
        given = closed(function.parameters) if is_closed else function.parameters
        return {"type": "object", **given}
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _chosen_name(choice: Any) -> str | None:
    """Returns the function that a tool choice names; None if it is not of that form."""
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or choice.get("type", "function") != "function":
        return None
    name = function.get("name")
    return name if isinstance(name, str) and name else None


def _check_parameters(function: str, parameters: dict[str, Any]) -> None:
    kind = parameters.get("type", "object")
    if kind != "object":
        raise ValueError(
            f"the parameters of {shown(function)} have the type {shown(kind)}: describe them by a "
            'JSON schema of the type "object"'
        )
    try:
        check_schema(parameters)
    except ValueError as error:
        raise ValueError(
            f"the parameters of {shown(function)} are not a usable JSON schema: {error}"
        ) from None
