"""The format of the Hermes models, which Qwen 2.5 and Qwen 3 share.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Several calls are several such blocks. Hermes 2 Pro writes the arguments before the name.
https://github.com/NousResearch/Hermes-Function-Calling
"""

from fairkv_jax.serve.tool_calls.json_reader import Reader, skip_space
from fairkv_jax.serve.tool_calls.parser import ToolParser


class HermesParser(ToolParser):
    """Parses calls between `<tool_call>` and `</tool_call>`; the latter may be missing."""

    markers = ("<tool_call>",)
    endings = ("</tool_call>",)
    special_tokens = True

    def _read_calls(self, marker: str) -> Reader:
        char = yield from skip_space((yield))
        return (yield from self._read_call_object(char))
