"""Outputs that a grammar forces to be tool calls: `tool_choice` "required" or a named function."""

from fairkv_jax.serve.tool_calls.events import Arguments, CallEnd, CallStart, Event
from fairkv_jax.serve.tool_calls.json_reader import Reader, skip_space
from fairkv_jax.serve.tool_calls.parser import ToolParser


class RequiredParser(ToolParser):
    """Parses the array [{"name": ..., "parameters": {...}}] that `required_schema` describes.

    A call that the output's limit cuts off is a call whose arguments are incomplete.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begin("")

    def finish(self) -> list[Event]:
        return self._drain() if self._follows_call else super().finish()

    def _read_calls(self, marker: str) -> Reader:
        char = yield from skip_space((yield))
        return (yield from self._read_call_array(char))


class NamedParser:
    """Takes the whole output as the arguments of one function, but for white space before them."""

    def __init__(self, name: str):
        self._head: list[Event] = [CallStart(name)]
        self._is_empty = True

    def push(self, text: str) -> list[Event]:
        """Reads more of the output, and returns what it tells."""
        text = text.lstrip() if self._is_empty else text
        self._is_empty = self._is_empty and not text
        head, self._head = self._head, []
        return [*head, Arguments(text)] if text else head

    def finish(self) -> list[Event]:
        """Ends the output, and returns what that tells."""
        return [*self.push(""), CallEnd()]
