"""The tools of a request, and the JSON schemas that force an output to call them."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from fairkv_jax.serve.body import Body

MAX_TOOLS = 128
"""OpenAI's limit."""
MAX_SCHEMA_DEPTH = 64
_MAX_NAME_CHARACTERS = 256
_SHOWN_CHARACTERS = 100

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_SCHEMA_MEMBERS = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_LIST_MEMBERS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_MEMBERS = ("properties", "patternProperties", "$defs", "definitions")
"""Members of a JSON schema that are a schema, a list of schemas, and schemas by name."""


class Function(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=_MAX_NAME_CHARACTERS)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the type object; without it, the function has no parameters."""
    strict: bool | None = None


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
                    f"{names.count(name)} functions have the name {_shown(name)}: give each its own"
                )
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
                f'{{"name": "..."}}}}, got {_shown(choice)}'
            )
        tools = info.data.get("tools")
        if "tools" in info.data and not tools:
            raise ValueError(f"{_shown(name or choice)} needs tools: send tools, or leave it out")
        names = [tool.function.name for tool in tools or ()]
        if tools and name is not None and name not in names:
            known = _shown(", ".join(names))
            raise ValueError(f"there is no function {_shown(name)} in tools, which has {known}")
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
                return _parameters(tool.function)
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
        definitions[place] = _moved(_parameters(tool.function), f"#/$defs/{place}")
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
    return schema if is_parallel else schema | {"maxItems": 1}


def _parameters(function: Function) -> dict[str, Any]:
    if function.parameters:
        return {"type": "object", **function.parameters}
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """Returns a schema whose references to itself begin at another place than the root."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def _chosen_name(choice: Any) -> str | None:
    """Returns the function that a tool choice names; None if it is not of that form."""
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or choice.get("type", "function") != "function":
        return None
    name = function.get("name")
    return name if isinstance(name, str) and name else None


def _check_parameters(function: str, parameters: dict[str, Any]) -> None:
    """Checks the form of a JSON schema, which is compiled only if it constrains the output.

    Raises:
        ValueError: it is not a schema of an object, or nested too deeply.
    """
    kind = parameters.get("type", "object")
    if kind != "object":
        raise ValueError(
            f"the parameters of {_shown(function)} have the type {_shown(kind)}: describe them by "
            'a JSON schema of the type "object"'
        )
    _check_depth(function, parameters)
    schemas: list[Any] = [parameters]
    while schemas:
        schema = schemas.pop()
        if isinstance(schema, bool):
            continue
        for fault in _faults(schema):
            raise ValueError(f"the parameters of {_shown(function)} are not a JSON schema: {fault}")
        for name in _SCHEMA_MEMBERS:
            if name in schema and not (name == "items" and isinstance(schema[name], list)):
                schemas.append(schema[name])
        for name in _LIST_MEMBERS:
            schemas.extend(schema.get(name, ()))
        for name in _NAMED_MEMBERS:
            schemas.extend(schema.get(name, {}).values())


def _check_depth(function: str, value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(
                f"the parameters of {_shown(function)} are nested more than {MAX_SCHEMA_DEPTH} "
                "levels deep: use $defs"
            )
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict | list):
                inside.extend(each.values() if isinstance(each, dict) else each)
        level = inside


def _faults(schema: Any) -> Iterator[str]:
    """Yields what is wrong with one schema, without those inside it."""
    if not isinstance(schema, dict):
        yield f"{_shown(schema)} stands where a schema must be, which is an object"
        return
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            yield f"the type {_shown(kind)} is none of {', '.join(_TYPES)}"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        yield f"required must be a list of names, got {_shown(required)}"
    for names, form, words in (
        (("enum", *_LIST_MEMBERS), list, "a list"),
        (_NAMED_MEMBERS, dict, "an object"),
    ):
        for name in names:
            if not isinstance(schema.get(name, form()), form):
                yield f"{name} must be {words}, got {_shown(schema[name])}"


def _shown(value: Any) -> str:
    """Returns a value as an error shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
