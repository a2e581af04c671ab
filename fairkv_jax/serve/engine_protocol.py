"""What the server needs of an engine, and whom it tells of requests and steps."""

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from fairkv_jax.config import EngineConfig, KVConfig, ModelConfig
from fairkv_jax.engine.prefix_registry import PrefixRegistry
from fairkv_jax.engine.request import CachedPrefix, Request, RequestOutput, ValidatedRequest
from fairkv_jax.engine.stats import EngineStats, RetainedPrefix
from fairkv_jax.plan import Plan
from fairkv_jax.sampling_params import StructuredOutputsParams
from fairkv_jax.tokenizer import Tokenizer


class Engine(Protocol):
    """The engine's methods that the server uses.

    `validate`, `compile_grammar`, `cached_prefix` and `retained_prefixes` may be called from any
    thread, and prefixes be looked up; all other methods are called from one thread only.
    """

    model_name: str
    model_config: ModelConfig
    engine_config: EngineConfig
    kv_config: KVConfig
    tokenizer: Tokenizer
    plan: Plan
    prefixes: PrefixRegistry

    @property
    def kv_capacity_tokens(self) -> int: ...
    def compile_grammar(
        self, params: StructuredOutputsParams, cancelled: threading.Event | None = None
    ) -> None: ...
    def start_workers(self) -> None: ...
    def validate(self, request: Request) -> ValidatedRequest: ...
    def add_request(self, request: ValidatedRequest) -> None: ...
    def abort_request(self, request_id: str) -> None: ...
    def has_unfinished_requests(self) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def stats(self) -> EngineStats: ...
    def retained_prefixes(self, most: int) -> list[RetainedPrefix]: ...
    def cached_prefix(self, prefix_id: str, owner: str = "") -> CachedPrefix: ...
    def delete_prefix(self, prefix_id: str, owner: str = "") -> None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """Receives every request and the engine's state after every step, in the event loop."""

    def submitted(self, requests: Sequence[Request]) -> None: ...
    def stepped(self, outputs: Sequence[RequestOutput], stats: EngineStats) -> None: ...
    def dropped(self, request_ids: Iterable[str]) -> None: ...
