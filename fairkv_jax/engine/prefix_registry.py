"""The prefixes that users have named, by id."""

from weakref import WeakValueDictionary

from fairkv_jax.compress.budgets import budgets_per_head, request_kv_config, request_policies
from fairkv_jax.compress.registry import make_method, query_agnostic_policies
from fairkv_jax.config import KVConfig, ModelConfig
from fairkv_jax.engine.prefix_cache import Prefix, prefix_key
from fairkv_jax.engine.request import Part, PrefixRecord, Request


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
            check_shareable(config, self._kv_config, len(prompt), self._model)
        is_chat = request.messages is not None  # what follows is then rendered differently
        options = [request.owner, request.cache_salt, is_chat, *_options(config)]
        prefix = self._find(prefix_key(prompt, options), len(prompt))
        return PrefixRecord(prefix, request)

    def after(self, parent: Prefix | None, request: Request, part: Part) -> Prefix:
        """Returns the prefix that ends with a part of a request's prompt, after `parent`."""
        options = [] if part.is_whole else _options(part.options)
        before = [request.owner, request.cache_salt, None if parent is None else parent.key]
        tokens = request.prompt_token_ids[part.start : part.stop]
        return self._find(prefix_key(tokens, [*before, "segment", *options]), part.stop, parent)

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

    def _find(self, key: str, num_tokens: int, parent: Prefix | None = None) -> Prefix:
        """Returns the prefix with this key; a new one, if there is none or it is given up."""
        prefix = self._prefixes.get(key)
        if prefix is None or prefix.is_unwanted:
            prefix = self._prefixes[key] = Prefix(key, num_tokens, parent)
        return prefix


class UnknownPrefix(ValueError):
    """No prefix has that id."""


def keeps_whole(config: KVConfig, num_tokens: int, model: ModelConfig) -> bool:
    """Returns whether every head keeps all of a text of that length."""
    return _least_kept(config, num_tokens, model) >= num_tokens


def check_shareable(
    config: KVConfig, engine: KVConfig, num_tokens: int, model: ModelConfig
) -> None:
    """Raises ValueError if what is kept of a prefix would depend on how it ends.

    `engine` are the engine's own options, which say what else a request may choose.
    """
    kept = _least_kept(config, num_tokens, model)
    if kept >= num_tokens or make_method(config).is_query_agnostic:
        return
    allowed = request_policies(engine)
    names = [name for name in query_agnostic_policies() if name in allowed]
    names = [name for name in names if name != config.policy]
    raise ValueError(
        f"kv_policy {config.policy!r} chooses what to keep by the end of the prompt, so it can "
        f"only share prefixes that are kept whole, and of the {num_tokens} tokens of this one a "
        f"head may keep {kept}: use kv_policy {' or '.join(names)} for it, or a shorter one"
    )


def _least_kept(config: KVConfig, num_tokens: int, model: ModelConfig) -> int:
    budgets = budgets_per_head(config, num_tokens, model.num_layers, model.num_kv_heads)
    return min(map(min, budgets))


def _options(config: KVConfig) -> list[object]:
    """What the compression of a prefix depends on, besides its tokens."""
    return [value for name, value in sorted(vars(config).items()) if name != "suffix"]
