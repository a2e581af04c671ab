"""Reasoning and answer, whole and divided at every character."""

import pytest

from fairkv_jax.serve.message import MessageBuilder, PlainText
from fairkv_jax.serve.reasoning import REASONING_FORMATS, continued
from fairkv_jax.serve.tool_calls import TOOL_PARSERS
from tests.serve.tool_calls.reading import divisions, said, streamed, whole

OPEN = "<|im_start|>assistant\n<think>\n"
SHUT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PLAIN = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "prompt", "output", "reasoning", "content"),
    [
        # DeepSeek R1's template opens the reasoning; earlier ones leave that to the model.
        ("deepseek_r1", OPEN, "Two and\ntwo.\n</think>\n\n4", "Two and\ntwo.\n", "\n\n4"),
        ("deepseek_r1", PLAIN, "Two.</think>4", "Two.", "4"),
        ("deepseek_r1", PLAIN, "<think>\nTwo.</think>4</think>", "\nTwo.", "4</think>"),
        ("deepseek_r1", OPEN, "cut </thin", "cut </thin", None),
        ("deepseek_r1", PLAIN, "<th", "<th", None),
        ("deepseek_r1", OPEN, "<think>Two.</think>4", "Two.", "4"),
        ("deepseek_r1", SHUT, "It is <think>4", "", "It is <think>4"),
        # Qwen 3 opens it itself; the template of its thinking models does so in the prompt.
        ("qwen3", PLAIN, "<think>\nTwo.\n</think>\n\n4", "\nTwo.\n", "\n\n4"),
        ("qwen3", PLAIN, "\n <think></think>\n\n4", "", "\n\n4"),
        ("qwen3", OPEN, "Two.</think>4", "Two.", "4"),
        ("qwen3", SHUT, "4 < 5", "", "4 < 5"),
        ("qwen3", PLAIN, "<thin ice>", "", "<thin ice>"),
        ("qwen3", PLAIN, "<think", "", "<think"),
        ("qwen3", PLAIN, "", "", ""),
    ],
)
def test_reasoning(name: str, prompt: str, output: str, reasoning: str, content: str | None):
    parser = REASONING_FORMATS[name].parser

    def build() -> MessageBuilder:
        return MessageBuilder(PlainText(), parser(prompt), str)

    expected = said(content, reasoning=reasoning)
    assert whole(build, output) == expected
    for pieces in divisions(output):
        assert streamed(build, pieces) == expected, pieces


@pytest.mark.parametrize(
    ("name", "prompt", "output", "end"),
    [
        ("deepseek_r1", OPEN, "Two.</think>4</think>", len("Two.</think>")),
        ("deepseek_r1", PLAIN, "cut </thin", None),
        ("deepseek_r1", PLAIN, "<th", None),
        ("deepseek_r1", SHUT, "4", 0),
        ("qwen3", PLAIN, "\n<think></think>\n4", len("\n<think></think>")),
        ("qwen3", OPEN, "Two.", None),
        ("qwen3", PLAIN, "<thin ice>", 0),
        ("qwen3", PLAIN, "<th", 0),
    ],
)
def test_where_the_reasoning_ends(name: str, prompt: str, output: str, end: int | None):
    for pieces in [[output], *divisions(output)]:
        parser = REASONING_FORMATS[name].parser(prompt)
        for piece in pieces:
            parser.push(piece)
        parser.finish()
        assert parser.end == end


@pytest.mark.parametrize(
    ("name", "prompt", "precedes"),
    [
        ("deepseek_r1", PLAIN, "required"),
        ("deepseek_r1", SHUT, None),
        ("qwen3", PLAIN, "optional"),
        ("qwen3", OPEN, "required"),
        ("qwen3", SHUT, None),
    ],
)
def test_what_a_constraint_must_leave_room_for(name: str, prompt: str, precedes: str | None):
    assert REASONING_FORMATS[name].parser(prompt).precedes == precedes


@pytest.mark.parametrize(
    ("message", "precedes", "expected"),
    [
        ("So", None, said("a</think>b")),
        ("<think>So", "required", said("b", reasoning="a")),
        ("<think>So</think>", None, said("a</think>b")),
    ],
)
def test_a_message_that_is_continued(message: str, precedes: str | None, expected: dict):
    assert continued(message).precedes == precedes
    output = "a</think>b"
    assert whole(lambda: MessageBuilder(PlainText(), continued(message), str), output) == expected


def test_calls_are_looked_for_in_the_answer_only():
    call = '<tool_call>\n{"name": "a", "arguments": {"n": 1}}\n</tool_call>'
    output = f"<think>\nI could write {call}.\n</think>\n\n{call}"

    def build(*, shows_reasoning: bool = True) -> MessageBuilder:
        reasoning = REASONING_FORMATS["qwen3"].parser(PLAIN)
        return MessageBuilder(
            TOOL_PARSERS["hermes"](), reasoning, lambda: "id", shows_reasoning=shows_reasoning
        )

    thought = f"\nI could write {call}.\n"
    expected = said(None, ("a", '{"n": 1}'), reasoning=thought)
    assert whole(build, output) == expected
    for pieces in divisions(output):
        assert streamed(build, pieces) == expected
    assert whole(lambda: build(shows_reasoning=False), output) == said(None, ("a", '{"n": 1}'))
