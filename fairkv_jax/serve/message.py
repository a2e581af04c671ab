"""Builds the assistant's message, or its deltas, from the text that the model generates.

text -> ReasoningParser -> reasoning
                        -> content -> tool parser -> content, tool calls
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fairkv_jax.serve.errors import ApiError
from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.protocol import ChatBody
from fairkv_jax.serve.reasoning import (
    REASONING_FORMATS,
    ReasoningFormat,
    ReasoningParser,
    continued,
)
from fairkv_jax.serve.tool_calls import TOOL_PARSERS
from fairkv_jax.serve.tool_calls.events import (
    Arguments,
    CallBroken,
    CallEnd,
    CallStart,
    Event,
    Text,
)
from fairkv_jax.serve.tool_calls.forced import NamedParser, RequiredParser
from fairkv_jax.serve.tool_calls.parser import ToolParser


class CallFinder(Protocol):
    """Finds the tool calls in an output that arrives in pieces."""

    def push(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


@dataclass(frozen=True)
class MessageFormat:
    """How the outputs of one request become messages."""

    body: ChatBody
    tool_parser: type[ToolParser] | None
    reasoning: ReasoningFormat | None

    @classmethod
    def of(cls, body: ChatBody, options: ServerOptions) -> "MessageFormat":
        """Returns the format that a request asks for, of those that the server is started with.

        Raises:
            ApiError: the model is to decide whether to call tools, and the server does not know
                how it writes calls.
        """
        parser = TOOL_PARSERS.get(options.tool_call_parser or "")
        if body.finds_calls and (parser is None or not options.enable_auto_tool_choice):
            raise ApiError(
                400,
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to '
                'be set: start the server with them, or send tool_choice "required", "none" or a '
                "named function",
                "tool_choice",
            )
        return cls(body, parser, REASONING_FORMATS.get(options.reasoning_parser or ""))

    @property
    def shows_special_tokens(self) -> bool:
        """Whether special tokens must not be skipped, because they may mark calls or reasoning."""
        marks_calls = self.tool_parser is not None and self.tool_parser.special_tokens
        return self.reasoning is not None or (self.body.finds_calls and marks_calls)

    def reasoning_parser(self, prompt: str) -> ReasoningParser | None:
        """Returns a parser for an output that follows this prompt."""
        if self.reasoning is None:
            return None
        if self.body.continue_final_message:
            return continued(self.body.messages[-1].as_dict()["content"])
        return self.reasoning.parser(prompt)

    def builder(self, prompt: str) -> "MessageBuilder":
        """Returns a builder for an output that follows this prompt."""
        body, parser = self.body, self.tool_parser
        return MessageBuilder(
            self._call_finder(),
            self.reasoning_parser(prompt),
            parser.new_call_id if parser else ToolParser.new_call_id,
            is_parallel=body.parallel_tool_calls is not False,
            is_named=body.named_function is not None,
            shows_reasoning=body.include_reasoning is not False,
        )

    def _call_finder(self) -> "CallFinder":
        if self.body.named_function is not None:
            return NamedParser(self.body.named_function)
        if self.body.calls_schema is not None:
            return RequiredParser()
        if self.body.finds_calls and self.tool_parser is not None:
            return self.tool_parser()
        return PlainText()


class PlainText:
    """Takes the whole output as content."""

    def push(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class MessageBuilder:
    """The message of one choice, which is generated piece by piece."""

    def __init__(
        self,
        finder: CallFinder,
        reasoning: ReasoningParser | None,
        new_call_id: Callable[[], str],
        *,
        is_parallel: bool = True,
        is_named: bool = False,
        shows_reasoning: bool = True,
    ):
        """Begins an empty message.

        Args:
            is_parallel: whether several tool calls are reported, or only the first one.
            is_named: whether the request named the function to call.
            shows_reasoning: whether the message contains the reasoning.
        """
        self._finder = finder
        self._reasoning = reasoning
        self._new_call_id = new_call_id
        self._is_parallel = is_parallel
        self._is_named = is_named
        self._shows_reasoning = shows_reasoning
        self._num_started = 0  # calls of which a delta has been returned
        self._num_complete = 0
        self._has_started = False
        self._is_dropping = False

    @property
    def reasoning(self) -> ReasoningParser | None:
        """What separates the reasoning; None if nothing does."""
        return self._reasoning

    def delta(self, text: str, *, is_last: bool = False) -> dict[str, Any]:
        """Reads more of the output, and returns what it adds to the message.

        What was sent of a call that turns out to be malformed cannot be taken back: its arguments
        end where the format was broken, and what follows is content.
        """
        reasoning, events = self._read(text, is_last)
        delta: dict[str, Any] = self._reasoning_fields(reasoning)
        content = "".join(event.text for event in events if isinstance(event, Text))
        if content:
            delta["content"] = content
        calls: dict[int, dict[str, Any]] = {}
        index = self._num_started - 1
        for event in events:
            if isinstance(event, CallStart):
                index += 1
                calls[index] = {"index": index, **self._new_call(event)}
            elif isinstance(event, Arguments):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
        self._num_started = index + 1
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def message(self, text: str) -> dict[str, Any]:
        """Returns the message whose whole text this is; malformed calls are content."""
        reasoning, events = self._read(text, is_last=True)
        content = ""
        calls: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Text(text):
                    content += text
                case CallStart():
                    calls.append(self._new_call(event))
                case Arguments(text):
                    calls[-1]["function"]["arguments"] += text
                case CallBroken(text):
                    calls.pop()
                    content += text
        has_content = bool(content) or not (calls or reasoning)
        return {
            "role": "assistant",
            "content": content if has_content else None,
            **self._reasoning_fields(reasoning),
            **({"tool_calls": calls} if calls else {}),
        }

    def finish_reason(self, reason: str | None) -> str | None:
        """Returns OpenAI's finish reason: a call that the request named ends with "stop"."""
        called = self._num_complete and not self._is_named
        return "tool_calls" if called and reason == "stop" else reason

    def _read(self, text: str, is_last: bool) -> tuple[str, list[Event]]:
        """Returns the reasoning and the events in the next piece of the output."""
        reasoning, content = "", text
        if self._reasoning is not None:
            reasoning, content = self._reasoning.push(text)
            if is_last:
                rest = self._reasoning.finish()
                reasoning, content = reasoning + rest[0], content + rest[1]
        events = self._finder.push(content)
        if is_last:
            events = [*events, *self._finder.finish()]
        return reasoning, list(self._reported(events))

    def _reported(self, events: Iterable[Event]) -> Iterator[Event]:
        """Drops the calls that may not be reported, and counts the complete ones."""
        for event in events:
            if isinstance(event, CallStart):
                self._is_dropping = not self._is_parallel and self._has_started
                self._has_started = True
            if isinstance(event, Text) or not self._is_dropping:
                yield event
                self._num_complete += isinstance(event, CallEnd)
            elif isinstance(event, CallBroken):
                yield Text(event.text)

    def _reasoning_fields(self, reasoning: str) -> dict[str, Any]:
        """Returns the reasoning under vLLM's present and earlier name, if there is any."""
        if not reasoning or not self._shows_reasoning:
            return {}
        return {"reasoning": reasoning, "reasoning_content": reasoning}

    def _new_call(self, start: CallStart) -> dict[str, Any]:
        function = {"name": start.name, "arguments": ""}
        return {"id": self._new_call_id(), "type": "function", "function": function}
