"""Renders conversations to prompts, and finds where the segments of these prompts may end.

The prompt of a conversation may be divided behind a text with a `cache_control` mark, behind every
message that a user's message follows, and before every answer, where its generation began:

    system: Be brief.| user: Hello. assistant: |Hi.| user: What is the time? assistant:

The prompt of the next turn is then divided in the same places, and the parts that it shares with
this one are equal, token for token: every part is tokenized apart.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fairkv_jax.engine.request import Boundary, PrefixRecord
from fairkv_jax.tokenizer import Message, Tokenizer, check_messages

_PRIVATE_USE = range(0xE000, 0xF8FF)
"""Characters that Unicode gives no meaning; one that the texts do not hold delimits signs."""


@dataclass(frozen=True)
class ChatPrompt:
    """The prompt of a conversation."""

    text: str
    token_ids: list[int]
    boundaries: tuple[Boundary, ...] = ()
    """Where its segments may end, see `Request.boundaries`."""


@dataclass(frozen=True)
class _Cut:
    """A place in the text of a message where the prompt may be divided."""

    message: int
    offset: int
    is_marked: bool = False
    ends_answer: bool = False


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation's prompt."""

    text: str
    places: tuple[tuple[int, _Cut], ...] = ()
    """Characters before each place where it may be divided, ascending."""

    def tokenized(self, tokenizer: Tokenizer, add_special_tokens: bool = False) -> ChatPrompt:
        """Tokenizes the text piece by piece; special tokens are added to a text of one piece only.

        The last token of an answer belongs to what follows: when an answer ends because it has
        reached its limit, the keys of that token are not in the cache.

        Raises:
            ValueError: the text is not valid Unicode.
        """
        token_ids, boundaries, start, before = [], [], 0, None
        for place, cut in self.places:
            token_ids += tokenizer.encode(self.text[start:place], add_special_tokens=False)
            # The template may not show where the answer begins, if it leaves out reasoning.
            ends_answer = cut.ends_answer and before == _Cut(cut.message, 0)
            boundaries.append(Boundary(len(token_ids) - ends_answer, cut.is_marked, ends_answer))
            start, before = place, cut
        adds = add_special_tokens and not self.places
        token_ids += tokenizer.encode(self.text[start:], add_special_tokens=adds)
        return ChatPrompt(self.text, token_ids, tuple(boundaries))


def chat_prompt(tokenizer: Tokenizer, *args: Any, **options: Any) -> ChatPrompt:
    """Renders a conversation and tokenizes it, see `rendered_chat`."""
    return rendered_chat(tokenizer, *args, **options).tokenized(tokenizer)


def rendered_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    record: PrefixRecord | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    divides: bool = False,
    cancelled: threading.Event | None = None,
) -> RenderedChat:
    """Renders a conversation; with `record`, only what follows the prefix's messages.

    Args:
        messages: The content of each is a text, or a list of parts `{"type": "text", "text": ...}`,
            which are joined by line breaks. Messages and parts may have a mark `"cache_control":
            {"type": "ephemeral"}`.
        add_generation_prompt: Like the next two arguments and `cancelled`, an argument of
            `Tokenizer.apply_chat_template`.
        divides: Whether to look for boundaries; without, the prompt is tokenized as a whole.

    Raises:
        ValueError: the template rejects the conversation, renders the prefix's messages differently
            when others follow, or changes a message that has a mark.
    """
    check_messages(messages)
    plain = [flat_message(message) for message in messages]
    apply_template = partial(
        tokenizer.apply_chat_template,
        add_generation_prompt=add_generation_prompt,
        cancelled=cancelled,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
    )

    def render(messages: Sequence[Message]) -> str:
        return _render(apply_template, messages, record)

    text = render(plain)
    if not divides:
        return RenderedChat(text)
    cuts = [cut for i in range(len(messages)) for cut in _cuts(messages, plain, i)]
    found = _places(render, plain, cuts, text)
    if found is None:
        if any(cut.is_marked for cut in cuts):
            raise ValueError(
                "the model's chat template changes the messages' texts, so their cache_control "
                "marks cannot be placed: leave out cache_control, or use /v1/prefixes"
            )
        found = []
    return RenderedChat(text, tuple(found))


def flat_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message as chat templates expect it: its content is a text, marks are left out."""
    flat = {name: value for name, value in message.items() if name != "cache_control"}
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part for part in content if isinstance(part, Mapping)]
        if len(parts) == len(content):  # else the tokenizer refuses it
            flat["content"] = "\n".join(str(part.get("text", "")) for part in parts)
    return flat


def _render(
    apply_template: Callable[[Sequence[Message]], str],
    messages: Sequence[Message],
    record: PrefixRecord | None,
) -> str:
    if record is None or record.request.messages is None:
        return apply_template(messages)
    before = record.request.prompt
    whole = apply_template([*record.request.messages, *messages])
    assert before is not None
    if not whole.startswith(before):
        raise ValueError(
            "the model's chat template writes the messages of the prefix differently when others "
            "follow, so they cannot be continued: cache the prefix as a text"
        )
    return whole[len(before) :]


def _cuts(
    messages: Sequence[Mapping[str, Any]], plain: Sequence[Message], index: int
) -> list[_Cut]:
    """Lists the cuts of one message.

    None is next to white space, which templates may strip: they move before it.
    """
    message, text = messages[index], plain[index]["content"]
    is_answer = message.get("role") == "assistant"
    precedes_user = index + 1 < len(messages) and messages[index + 1].get("role") == "user"
    ends = {len(text)} if message.get("cache_control") else set()
    if not isinstance(message["content"], str):
        at = -1
        for part in message["content"] or ():
            at += len(str(part.get("text", ""))) + 1
            ends |= {at} if part.get("cache_control") else set()
    marked = {len(text[:end].rstrip()) for end in ends}
    cuts = [_Cut(index, 0)] if is_answer and text[:1].strip() else []
    end = len(text.rstrip())
    cuts += [_Cut(index, offset, is_marked=True) for offset in sorted(marked - {0, end})]
    if end and (precedes_user or end in marked):
        is_whole = is_answer and len(cuts) == 1 and cuts[0].offset == 0
        cuts.append(_Cut(index, end, end in marked, ends_answer=is_whole))
    return cuts


def _places(
    render: Callable[[Sequence[Message]], str],
    messages: Sequence[Message],
    cuts: Sequence[_Cut],
    text: str,
) -> list[tuple[int, _Cut]] | None:
    """Returns where cuts lie in the rendered text; None where the template changes the texts.

    Signs are written into the messages, and looked for in the rendered conversation. What it does
    not show of the messages has no place.
    """
    sign = next((chr(code) for code in _PRIVATE_USE if chr(code) not in text), None)
    if not cuts or sign is None:
        return []
    signed = [dict(message) for message in messages]
    for number, cut in reversed(list(enumerate(cuts))):
        content = signed[cut.message]["content"]
        content = f"{content[: cut.offset]}{sign}{number}{sign}{content[cut.offset :]}"
        signed[cut.message]["content"] = content
    try:
        rendered = render(signed)
    except ValueError:
        return None  # the template takes only texts that it knows
    found, seen, clean = [], -1, ""
    for index, piece in enumerate(re.split(f"{sign}(\\d+){sign}", rendered)):
        if index % 2 == 0:
            clean += piece
            continue
        number = int(piece)
        if number <= seen:
            return None
        found.append((len(clean), cuts[number]))
        seen = number
    return found if clean == text else None
