"""Where the prompts of conversations may be divided, by what the chat template makes of them."""

from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fairkv_jax.engine.conversation import chat_prompt
from fairkv_jax.tokenizer import Tokenizer

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "<think>Hm.</think>Hi."},
    {"role": "user", "content": "What is it?"},
]


def make_tokenizer(content: str) -> Tokenizer:
    """One token per byte; `content` is what the template writes of each message."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    template = f"{{% for m in messages %}}[{{{{ m.role[0] }}}}]{{{{ {content} }}}}|{{% endfor %}}"
    template += "{% if add_generation_prompt %}[a]{% endif %}"
    return Tokenizer(backend, eos_token_ids=[0], chat_template=template)


def pieces(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[str]:
    prompt = chat_prompt(tokenizer, messages, divides=True)
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    ends = [0, *(each.position for each in prompt.boundaries), len(prompt.token_ids)]
    return [tokenizer.decode(prompt.token_ids[start:stop]) for start, stop in pairwise(ends)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "m.content",
            ["[s]Be brief.", "\n|[u]Hello.|[a]", "<think>Hm.</think>Hi", ".|[u]What is it?|[a]"],
        ),
        (
            "m.content | trim",
            ["[s]Be brief.", "|[u]Hello.|[a]", "<think>Hm.</think>Hi", ".|[u]What is it?|[a]"],
        ),
        (
            "m.content.split('</think>')[-1]",
            ["[s]Be brief.", "\n|[u]Hello.|[a]Hi.", "|[u]What is it?|[a]"],
        ),
        ("m.content | length", None),
    ],
)
def test_a_template_decides_where_messages_end(content: str, expected: list[str] | None):
    """It may strip and drop parts of them; where it changes them, nothing is divided."""
    tokenizer = make_tokenizer(content)
    whole = chat_prompt(tokenizer, MESSAGES).text
    assert pieces(tokenizer, MESSAGES) == (expected or [whole])


def test_marks_need_a_template_that_keeps_the_text():
    marked = [{**MESSAGES[1], **EPHEMERAL}]
    assert pieces(make_tokenizer("m.content"), marked) == ["[u]Hello.", "|[a]"]
    with pytest.raises(ValueError, match="leave out cache_control"):
        pieces(make_tokenizer("m.content | length"), marked)


def test_signs_are_not_taken_for_texts():
    """The character that would delimit them is part of a message, and so are others."""
    message = {"role": "user", "content": "\ue0000\ue000 {{ x }}", **EPHEMERAL}
    assert pieces(make_tokenizer("m.content"), [message])[0] == "[u]\ue0000\ue000 {{ x }}"


def test_parts_are_joined_and_marked():
    parts = [
        {"type": "text", "text": "one", **EPHEMERAL},
        {"type": "text", "text": ""},
        {"type": "text", "text": "two \n", **EPHEMERAL},
        {"type": "text", "text": "three"},
    ]
    found = pieces(make_tokenizer("m.content"), [{"role": "user", "content": parts}])
    assert found == ["[u]one", "\n\ntwo", " \n\nthree|[a]"]
