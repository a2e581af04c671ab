"""Tool calls: the tools of a request, and the parsers that find calls in outputs, by name.

Every parser is one class in one file, named for the format that it reads; the names are vLLM's.
"""

from fairkv_jax.serve.tool_calls.hermes import HermesParser
from fairkv_jax.serve.tool_calls.llama3_json import Llama3JsonParser
from fairkv_jax.serve.tool_calls.mistral import MistralParser
from fairkv_jax.serve.tool_calls.parser import ToolParser
from fairkv_jax.serve.tool_calls.pythonic import PythonicParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}
"""The values of --tool-call-parser."""
