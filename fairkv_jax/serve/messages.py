"""Conversations in requests: messages, and how the model's chat template renders them."""

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from fairkv_jax.serve.body import Body, NotServed
from fairkv_jax.serve.tool_calls.tools import ToolList
from fairkv_jax.serve.unsupported import MESSAGE, TEMPLATE, Refused

_OF_THE_SERVER = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "documents",
    "messages",
    "tokenize",
    "tools",
)
"""Variables of templates that have fields of their own, or that no request may set."""


class CacheControl(Body):
    """Anthropic's mark: what precedes the end of the marked text is cached for other requests."""

    type: Literal["ephemeral"]


class TextPart(Body):
    """A part of a message's content. Only text is supported."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if isinstance(kind, str) and kind not in _TEXT_PARTS:
            refused = Refused("it reads text only")
            raise NotServed("messages", refused, f"a content part of the type {kind[:64]!r}")
        # OpenAI's clients send a refusal back under its own name.
        return {**part, "text": part.get("refusal")} if kind == "refusal" else part


_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


class FunctionOfCall(Body):
    name: str
    arguments: str | dict[str, Any]
    """A JSON object, as text or as the object itself."""

    def parsed_arguments(self) -> dict[str, Any]:
        """Returns the arguments as an object.

        Raises:
            ValueError: they are not a JSON object.
        """
        arguments = self.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of the call of {self.name[:64]!r} are not a JSON object: send "
                'them as the model wrote them, for example "{\\"city\\": \\"Paris\\"}"'
            )
        return arguments


class ToolCall(Body):
    """A call of a tool that the assistant made earlier in the conversation."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionOfCall

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> "ToolCall":
        self.function.parsed_arguments()
        return self

    def as_dict(self) -> dict[str, Any]:
        """Returns the call as chat templates expect it: its arguments are an object, not text."""
        function = {"name": self.function.name, "arguments": self.function.parsed_arguments()}
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": self.type, "function": function}


class Message(Body):
    """One turn of a conversation; only text content is supported."""

    REFUSED = MESSAGE
    PATH = "messages"

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None
    """The parts of a list are joined by line breaks."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """The calls that the assistant made in this turn."""
    tool_call_id: str | None = None
    """The call that a message of the role "tool" answers."""
    reasoning: str | None = None
    """The assistant's reasoning, for templates that repeat it."""
    reasoning_content: str | None = None
    """Another name of `reasoning`."""
    cache_control: CacheControl | None = None
    """Marks the end of the message."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the message as `engine.conversation` takes it, without what is not set."""
        content: Any = self.content or ""
        if not isinstance(content, str):
            content = [part.model_dump(exclude_none=True) for part in content]
        message: dict[str, Any] = {"role": self.role, "content": content}
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.as_dict() for call in self.tool_calls or ()] or None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
            "cache_control": self.cache_control and self.cache_control.model_dump(),
        }
        return message | {name: value for name, value in optional.items() if value is not None}


class TemplateOptions(ToolList):
    """Fields that say how the chat template renders a conversation."""

    REFUSED = TEMPLATE

    add_generation_prompt: bool | None = None
    """Whether the prompt ends where the assistant's turn begins. Default: yes, unless
    `continue_final_message` is set."""
    continue_final_message: bool | None = None
    """Whether the last message stays open, so that the output continues it."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens, such as BOS. Default: only to a text, as chat
    templates write their own."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template, such as `enable_thinking`."""
    documents: list[dict[str, str]] | None = None
    """Documents for templates that support retrieval-augmented generation."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    """For templates of reasoning models: sets the variable of that name, and `enable_thinking`
    unless chat_template_kwargs do."""

    RESERVED: ClassVar[tuple[str, ...]] = _OF_THE_SERVER

    @model_validator(mode="after")
    def _one_way_to_begin(self) -> "TemplateOptions":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other: set one of "
                "them to false"
            )
        for name in self.RESERVED:
            if name in (self.chat_template_kwargs or ()):
                refused = Refused("requests set it by its own field, if at all")
                raise NotServed("chat_template_kwargs", refused, f"chat_template_kwargs.{name}")
        return self

    @property
    def opens_answer(self) -> bool:
        """Whether the generation prompt is added."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def template_variables(self) -> dict[str, Any]:
        """Further variables of the template."""
        variables: dict[str, Any] = {}
        if self.documents is not None:
            variables["documents"] = self.documents
        if self.reasoning_effort is not None:
            thinks = self.reasoning_effort != "none"
            variables |= {"reasoning_effort": self.reasoning_effort, "enable_thinking": thinks}
        return {**variables, "tools": self.template_tools, **(self.chat_template_kwargs or {})}
