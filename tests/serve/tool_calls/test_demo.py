"""A small real model calls the tools that it must call."""

import json
from pathlib import Path

import pytest

from fairkv_jax import LLM
from fairkv_jax.serve.message import MessageBuilder
from fairkv_jax.serve.protocol import ChatBody
from fairkv_jax.serve.tool_calls.forced import RequiredParser
from fairkv_jax.serve.tool_calls.parser import ToolParser

pytestmark = pytest.mark.slow


def test_the_demo_model_calls_a_required_tool(demo_checkpoint: Path):
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    weather = {"name": "get_weather", "parameters": parameters}
    system = f"You call this function: {json.dumps(weather)}"
    question = "Get the weather in Paris for the next 2 days."
    body = ChatBody.model_validate(
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
            ],
            "tools": [{"type": "function", "function": weather}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 0,
            "max_tokens": 60,
        }
    )
    llm = LLM(
        model=demo_checkpoint,
        kv_policy="full",
        max_model_len=256,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 26,
        progress=False,
    )
    turns = [message.as_dict() for message in body.messages]
    (output,) = llm.chat([turns], body.sampling_params())
    builder = MessageBuilder(RequiredParser(), None, ToolParser.new_call_id)
    message = builder.message(output.outputs[0].text)
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 2}
    assert builder.finish_reason(output.outputs[0].finish_reason) == "tool_calls"
