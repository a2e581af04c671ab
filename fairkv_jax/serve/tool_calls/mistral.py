"""The formats of Mistral's models.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}

The first is that of tokenizers before version 11, and has several calls in one array. Newer models
repeat the second; `[CALL_ID]...` may precede `[ARGS]`, and a decoded text may lack `[ARGS]`.
https://github.com/mistralai/mistral-common
"""

import secrets
import string

from fairkv_jax.serve.tool_calls.events import Malformed
from fairkv_jax.serve.tool_calls.json_reader import Reader, expect, read_value, skip_space
from fairkv_jax.serve.tool_calls.parser import ToolParser

_ID_CHARACTERS = string.ascii_letters + string.digits


class MistralParser(ToolParser):
    """Parses calls that follow `[TOOL_CALLS]`."""

    markers = ("[TOOL_CALLS]",)
    special_tokens = True

    @staticmethod
    def new_call_id() -> str:
        """Returns nine letters and digits: Mistral's chat templates refuse other ids."""
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))

    def _read_calls(self, marker: str) -> Reader:
        char = yield from skip_space((yield))
        if char == "[":
            return (yield from self._read_call_array(char))
        name = ""
        while char and char not in "[{" and not char.isspace():
            name += char
            char = yield
        char = yield from skip_space(char)
        if not name:
            raise Malformed(char)
        while char == "[":
            char = yield from self._read_tag(char)
        if char != "{":
            raise Malformed(char)
        self._start_call(name)
        char = yield from read_value(char, self._add_arguments)
        self._end_call()
        return char

    def _read_tag(self, char: str) -> Reader:
        """Reads `[ARGS]`, or `[CALL_ID]` and the id, which is dropped."""
        char = yield from expect("[", char)
        if char == "A":
            char = yield from expect("ARGS]", char)
        else:
            char = yield from expect("CALL_ID]", char)
            while char and char.isalnum():
                char = yield
        return (yield from skip_space(char))
