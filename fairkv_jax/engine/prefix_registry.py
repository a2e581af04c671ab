"""The prefixes that users have named, by id."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from fairkv_jax.compress.budgets import budgets_per_head, request_kv_config, request_policies
from fairkv_jax.compress.registry import make_method, query_agnostic_policies
from fairkv_jax.config import KVConfig, ModelConfig
from fairkv_jax.engine.prefix_cache import Prefix, prefix_key
from fairkv_jax.engine.request import PrefixRecord, Request
from fairkv_jax.tokenizer import Message, Tokenizer


class PrefixRegistry:
    """Finds prefixes by their ids; equal ones are one."""

    def __init__(self, model: ModelConfig, kv_config: KVConfig):
        self._model, self._kv_config = model, kv_config
        self._named: dict[str, PrefixRecord] = {}
        self._prefixes: WeakValueDictionary[str, Prefix] = WeakValueDictionary()
        """All that are in use anywhere, by key."""

    def record_of(self, request: Request) -> PrefixRecord:
        """Returns the prefix that a request computes, which need not be named yet.

        Raises:
            ValueError: compression would look at the prefix's own end and drop tokens.
        """
        prompt = request.prompt_token_ids
        config = request_kv_config(
            self._kv_config, request.kv_policy, request.kv_budget, request.kv_ratio
        )
        if request.require_query_agnostic:
            self._check_method(config, len(prompt))
        is_chat = request.messages is not None  # what follows is then rendered differently
        options = [request.owner, request.cache_salt, is_chat, *_options(config)]
        key = prefix_key(prompt, options)
        prefix = self._prefixes.get(key)
        if prefix is None or prefix.is_deleted:
            prefix = self._prefixes[key] = Prefix(key, len(prompt))
        return PrefixRecord(prefix, request)

    def add(self, record: PrefixRecord) -> PrefixRecord | None:
        """Names a prefix that has been computed; returns one of that name that it replaces.

        That can only be one that was deleted while this one was on its way, and cached again.
        """
        record.prefix.is_deleted = False
        before = self._named.get(record.id)
        self._named[record.id] = record
        return before if before is not None and before.prefix is not record.prefix else None

    def get(self, prefix_id: str, owner: str = "") -> PrefixRecord:
        """Finds a prefix of that owner.

        Raises:
            UnknownPrefix: there is none.
        """
        record = self._named.get(prefix_id)
        if record is None or record.request.owner != owner:
            raise UnknownPrefix(
                f"there is no prefix {prefix_id!r}: it was never cached, or it has been deleted"
            )
        return record

    def of_owner(self, owner: str = "") -> list[PrefixRecord]:
        """Returns the prefixes of that owner, the oldest first."""
        named = tuple(self._named.values())  # another thread may add one meanwhile
        return [record for record in named if record.request.owner == owner]

    def remove(self, prefix_id: str, owner: str = "") -> PrefixRecord:
        """Forgets a prefix of that owner.

        Raises:
            UnknownPrefix: there is none.
        """
        record = self.get(prefix_id, owner)
        del self._named[prefix_id]
        return record

    def _check_method(self, config: KVConfig, num_tokens: int) -> None:
        budgets = budgets_per_head(
            config, num_tokens, self._model.num_layers, self._model.num_kv_heads
        )
        keeps_whole = min(map(min, budgets)) >= num_tokens
        if not keeps_whole and not make_method(config).is_query_agnostic:
            allowed = request_policies(self._kv_config)
            names = [name for name in query_agnostic_policies() if name in allowed]
            names = [name for name in names if name != config.policy]
            raise ValueError(
                f"kv_policy {config.policy!r} chooses what to keep by the end of the prompt, so it "
                f"can only share prefixes that are kept whole, and of the {num_tokens} tokens of "
                f"this one a head may keep {min(map(min, budgets))}: use kv_policy "
                f"{' or '.join(names)} for it, or a shorter one"
            )


class UnknownPrefix(ValueError):
    """No prefix has that id."""


def _options(config: KVConfig) -> list[object]:
    """What the compression of a prefix depends on, besides its tokens."""
    return [value for name, value in sorted(vars(config).items()) if name != "suffix"]


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    record: PrefixRecord | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    cancelled: threading.Event | None = None,
) -> str:
    """Renders a conversation; with `record`, only what follows the prefix's messages.

    The other arguments are those of `Tokenizer.apply_chat_template`.

    Raises:
        ValueError: the template rejects the conversation, or renders the prefix's messages
            differently when others follow.
    """
    before = None
    if record is not None and record.request.messages is not None:
        before = record.request.prompt
        messages = [*record.request.messages, *messages]
    whole = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt,
        cancelled,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
    )
    if record is None or record.request.messages is None:
        return whole
    assert before is not None
    if not whole.startswith(before):
        raise ValueError(
            "the model's chat template writes the messages of the prefix differently when others "
            "follow, so they cannot be continued: cache the prefix as a text"
        )
    return whole[len(before) :]
