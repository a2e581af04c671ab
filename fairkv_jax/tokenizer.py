"""Tokenization: encoding, decoding, chat templates and incremental detokenization.

`Tokenizer` wraps a tokenizer of the `tokenizers` package and adds chat templates and end-of-text
ids. The readers of checkpoint formats create it.
"""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from fairkv_jax.chat_template import ChatTemplate
from fairkv_jax.token_bytes import TokenBytes

Message = Mapping[str, Any]
"""One message of a conversation: {"role": "user", "content": "..."}. Templates may read more keys.
"""


class Tokenizer:
    """Encodes prompts, decodes outputs and renders conversations.

    Special tokens in a text, such as "<|im_start|>", are encoded as their ids. Rendered
    conversations rely on this, and prompts may contain them too.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Iterable[int],
        chat_template: str | None = None,
        tool_use_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Creates a tokenizer.

        Args:
            tool_use_template: the chat template of conversations with tools, if it is another one.
            template_tokens: special tokens by their names in chat templates, such as "bos_token".
        """
        self._backend = backend
        self._chat_template = chat_template
        self._tool_use_template = tool_use_template
        self._template_tokens = dict(template_tokens or {})
        self._templates: dict[str, ChatTemplate] = {}
        self._token_bytes = TokenBytes(backend)
        self.eos_token_ids = frozenset(eos_token_ids)
        """The ids that end an output."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json to a folder."""
        templates: Any = self._chat_template
        if self._tool_use_template is not None:
            by_name = {"default": self._chat_template, "tool_use": self._tool_use_template}
            templates = [{"name": name, "template": text} for name, text in by_name.items() if text]
        options = self._template_tokens | {"chat_template": templates}
        ends = {"eos_token_id": sorted(self.eos_token_ids)}
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encodes a text, by default with the special tokens that the model expects, such as BOS.

        Raises:
            ValueError: the text contains an unpaired surrogate, which UTF-8 cannot represent.
        """
        return self._encode(text, add_special_tokens).ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text like `encode`; also returns the characters [start, stop) of every token.

        Raises:
            ValueError: see `encode`.
        """
        encoding = self._encode(text, add_special_tokens)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: it has an unpaired surrogate "
                f"({text[error.start]!r}) at position {error.start}: send the whole character"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Decodes ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def info(self) -> dict[str, Any]:
        """Returns the tokenizer's class, its vocabulary size, special tokens and chat template."""
        return {
            "tokenizer_class": type(self._backend.model).__name__,
            "vocab_size": self.vocab_size,
            **self._template_tokens,
            "eos_token_ids": sorted(self.eos_token_ids),
            "chat_template": self._chat_template,
        }

    def token_text(self, token_id: int) -> str:
        """Returns the text of a single token; special tokens are not skipped."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns what a single token adds to a text, in UTF-8; special tokens are not skipped.

        A token may begin or end within a character. An id without a token has no bytes.
        """
        return self._token_bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        """Returns whether a token is one of those that `skip_special_tokens` skips."""
        return token_id in self._token_bytes.special_ids

    def to_json(self) -> str:
        """Returns the contents of tokenizer.json, which do not include the chat template."""
        return self._backend.to_str()

    def detokenizer(
        self, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> "Detokenizer":
        """Returns an incremental decoder for one output; `context` holds the preceding ids."""
        return Detokenizer(self._backend, skip_special_tokens, context)

    def warm_up(self) -> None:
        """Starts the process that renders the chat template, if there is one."""
        if self._chat_template is not None:
            self._compiled_template().warm_up()

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        cancelled: threading.Event | None = None,
        *,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation with the model's chat template.

        The template writes the special tokens, so encode the result without adding any. `kwargs`
        and `chat_template_kwargs` are variables of the template, which JSON can represent.
        `cancelled`, when it is set, ends it early with `CallCancelled`.

        With `continue_final_message`, the text ends where the content of the last message ends, so
        that the model continues that message.

        Raises:
            ValueError: the model has no template, a message is malformed, or the template rejects
                the conversation or takes too much time or memory.
        """
        check_messages(messages)
        _check_texts(messages)
        variables = {**kwargs, **(chat_template_kwargs or {})}
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError(
                    "continue_final_message and add_generation_prompt exclude each other: set one "
                    "of them to false"
                )
            # Templates may repeat or strip contents, so a mark shows where the last one ends.
            mark = uuid4().hex
            last = {**messages[-1], "content": messages[-1]["content"] + mark}
            whole = self._render([*messages[:-1], last], False, variables, cancelled)
            text, found, _ = whole.rpartition(mark)
            if not found:
                raise ValueError(
                    "the model's chat template does not write the content of the last message, so "
                    "it cannot be continued"
                )
            return text
        return self._render(messages, add_generation_prompt, variables, cancelled)

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        further: Mapping[str, Any],
        cancelled: threading.Event | None,
    ) -> str:
        template = self._compiled_template(with_tools=bool(further.get("tools")))
        variables = self._template_tokens | {"tools": None, "documents": None, **further}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return template.render(variables, cancelled)

    def _compiled_template(self, *, with_tools: bool = False) -> ChatTemplate:
        source = self._chat_template
        if with_tools and self._tool_use_template is not None:
            source = self._tool_use_template
        if source is None:
            raise ValueError(
                "the model has no chat template: use completions, or an instruction-tuned "
                "checkpoint"
            )
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source)
        return self._templates[source]


class Detokenizer:
    """Decodes the token ids of one output incrementally.

    The concatenated results of all `push` calls and of `flush` equal `decode` of all ids. A
    character that is split over tokens is held back until it is complete. Decoders whose output
    depends on earlier tokens, such as SentencePiece's at invalid UTF-8, may differ in such cases.
    SentencePiece also strips the space before the first word of a text; the prompt's last token as
    `context` prevents that for the first word of an output.
    """

    def __init__(
        self, backend: Backend, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._held: list[int] = []  # The ids whose text has not been returned yet.
        self._start(context)

    def _start(self, context: Sequence[int]) -> None:
        """Starts a stream after the context, or without it if it ends within a character."""
        broken = self._decode(list(context)).endswith("\ufffd")
        self._emitted = [] if broken else list(context)  # The ids of the last returned text.
        self._stream = DecodeStream(self._emitted, skip_special_tokens=self._skip_special_tokens)

    @property
    def holds_back(self) -> bool:
        """Whether the text of some tokens has not been returned yet."""
        return bool(self._held)

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that it completes, or "" if it completes none."""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception as error:
            # The stream fails if a token changes the text before it, as invalid bytes do in
            # SentencePiece's decoders. Then the text that is held back is decoded separately.
            if "Invalid prefix" not in str(error):
                raise
            text = self.flush()
            self._start([token_id])
            return text
        if text is None:
            return ""
        self._emitted, self._held = self._held, []
        return text

    def flush(self) -> str:
        """Ends the output and returns the text held back, with U+FFFD for incomplete characters."""
        before = self._decode(self._emitted)
        text = self._decode(self._emitted + self._held)[len(before) :]
        self._held = []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip_special_tokens)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError unless the messages are a list of at least one mapping."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            'messages must be a list of at least one {"role": ..., "content": ...}, '
            f"got {messages!r}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f'messages[{index}] must be {{"role": ..., "content": ...}}, got {message!r}'
            )


def _check_texts(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"messages[{index}][{key!r}] must be a string, got {message.get(key)!r}"
                )
