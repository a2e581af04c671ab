"""The JSON format of Llama 3.1 and 3.2.

    {"name": "get_weather", "parameters": {"city": "Paris"}}

The model may write `<|python_tag|>` first, and semicolons between several calls.
https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

from fairkv_jax.serve.tool_calls.json_reader import Reader, skip_space
from fairkv_jax.serve.tool_calls.parser import ToolParser


class Llama3JsonParser(ToolParser):
    """Parses JSON objects that have a name and parameters; any other object is text."""

    markers = ("<|python_tag|>", "{")
    endings = (";",)

    def _read_calls(self, marker: str) -> Reader:
        if marker == "{":
            return (yield from self._read_call_object(marker))
        char = yield from skip_space((yield))
        return (yield from self._read_call_object(char))
