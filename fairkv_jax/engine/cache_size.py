"""Sizes the KV cache by the memory that the configuration grants."""

from dataclasses import replace

from fairkv_jax.config import EngineConfig, ModelConfig
from fairkv_jax.kv_cache_spec import KVCacheSpec, QueryStore
from fairkv_jax.sharding.slots import SlotLayout

_SHARING = 8
"""The page tables then still take less than 1 % of the cache, for heads of 128 in bfloat16."""


def size_cache(
    config: EngineConfig, model: ModelConfig, layout: SlotLayout, num_stored_queries: int = 0
) -> KVCacheSpec:
    """Returns the largest KV cache that fits, but no larger than all rows together can fill.

    `num_stored_queries` are the last queries of each row that it stores.

    Raises:
        ValueError: the cache could not hold one request of full length.
    """
    queries = None
    if num_stored_queries:
        queries = QueryStore(num_stored_queries, model.group_size, config.dtype)
    owned_slots = int(layout.replicas.sum((0, 1)).max())
    one_row = owned_slots * -(-config.max_model_len // config.page_size)
    spec = KVCacheSpec.fit(
        config.kv_cache_bytes,
        one_row * config.max_num_seqs,
        num_layers=model.num_layers,
        num_rows=config.max_num_seqs,
        num_devices=config.tensor_parallel_size,
        slots_per_device=layout.slots_per_device,
        head_dim=model.head_dim,
        page_size=config.page_size,
        max_tokens=config.max_model_len,
        dtype=config.page_dtype,
        sharing=_SHARING if config.enable_prefix_caching else 1,
        queries=queries,
    )
    if spec.pages_per_device < one_row:
        need = replace(spec, pages_per_device=one_row).bytes_per_device * spec.num_devices
        raise ValueError(
            f"a pool of {config.kv_cache_bytes / 2**20:.0f} MiB cannot hold one request of "
            f"max_model_len {config.max_model_len}, which may need {need / 2**20:.0f} MiB: "
            "raise kv_cache_memory_bytes or lower max_model_len"
        )
    return spec
