"""Text to token ids and back: encoding, chat templates, incremental detokenisation.

A `Tokenizer` wraps a backend of the `tokenizers` package and what the package leaves out. The
readers of checkpoint formats build it; nothing here knows where its parts came from.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

Message = Mapping[str, Any]
"""One turn of a chat: {"role": "user", "content": "..."}; templates may read further keys."""


class Tokenizer:
    """Encodes prompts, decodes outputs, renders chats.

    Special tokens that stand in the text, such as "<|im_start|>", become their ids: rendered
    chats rely on it, and whoever writes raw prompts may use them too.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Iterable[int],
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`template_tokens`: special tokens by the name that templates call, e.g. "bos_token"."""
        self._backend = backend
        self._chat_template = chat_template
        self._template_tokens = dict(template_tokens or {})
        self._template: jinja2.Template | None = None
        self._token_texts: dict[int, str] = {}
        self.eos_token_ids = frozenset(eos_token_ids)
        """The ids that end a turn or a text."""
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and the two small files of a published folder that go with it."""
        options = self._template_tokens | {"chat_template": self._chat_template}
        ends = {"eos_token_id": sorted(self.eos_token_ids)}
        (folder / "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with BOS in front where the model wants it.

        Raises:
            ValueError: the text holds half of a surrogate pair, which no UTF-8 can say.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: half a surrogate pair ({text[error.start]!r}) "
                f"at position {error.start}: send the whole character"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def info(self) -> dict[str, Any]:
        """What clients ask about it: its kind, its special tokens by name, its chat template."""
        return {
            "tokenizer_class": type(self._backend.model).__name__,
            "vocab_size": self.vocab_size,
            **self._template_tokens,
            "eos_token_ids": sorted(self.eos_token_ids),
            "chat_template": self._chat_template,
        }

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, special tokens included."""
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return self._token_texts[token_id]

    def to_json(self) -> str:
        """All of it but the chat template, as a tokenizer.json says it."""
        return self._backend.to_str()

    def detokenizer(
        self, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> "Detokenizer":
        """A fresh incremental decoder for one output; `context` are ids that stand before it."""
        return Detokenizer(self._backend, skip_special_tokens, context)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt of a chat, as the model was trained to read it; encode it without BOS.

        `kwargs` reach the template under their names.

        Raises:
            ValueError: the model has no template, a message is malformed, or the template
                refuses the conversation.
        """
        _check_messages(messages)
        if self._template is None:
            self._template = _compile(self._chat_template)
        variables = self._template_tokens | {"tools": None, "documents": None} | kwargs
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except Exception as error:  # the template is foreign code: it may raise anything
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error


class Detokenizer:
    """Turns the token ids of one output into text as they come.

    The text of all pushes and the flush together is what `decode` makes of all ids: a
    character that is split over tokens is held back until it is whole. Decoders that look back, as
    SentencePiece's do at bytes that are no UTF-8, may differ there. Those also strip the space
    before the first word of a text: with the prompt's last token as `context`, the output's first
    word is not the first.
    """

    def __init__(
        self, backend: Backend, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._held: list[int] = []  # the ids since the last text that left
        self._start(context)

    def _start(self, context: Sequence[int]) -> None:
        """A stream after these ids, or after none if they end within a character."""
        broken = self._decode(list(context)).endswith("\ufffd")
        self._emitted = [] if broken else list(context)  # the ids of the last text that left
        self._stream = DecodeStream(self._emitted, skip_special_tokens=self._skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that this token completes, "" where it completes none."""
        self._held.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception as error:
            # Where tokens change the text before them, as broken bytes in SentencePiece's decoders
            # do, the stream cannot go on; what it has not shown yet is decoded afresh.
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
        """The text still held back, an incomplete character as U+FFFD; the output is then over."""
        before = self._decode(self._emitted)
        text = self._decode(self._emitted + self._held)[len(before) :]
        self._held = []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _check_messages(messages: Sequence[Message]) -> None:
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
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"messages[{index}][{key!r}] must be a string, got {message.get(key)!r}"
                )


def _compile(source: str | None) -> jinja2.Template:
    """Compiles a template in the dialect in which models publish theirs.

    Templates come with the checkpoint, from anybody: the sandbox keeps them to their variables.
    """
    if source is None:
        raise ValueError(
            "the model has no chat template: use completions, or an instruction-tuned checkpoint"
        )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Jinja's own filter escapes <, > and & for HTML, which models have not seen.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template does not compile: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
