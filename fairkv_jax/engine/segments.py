"""Divides a prompt into the segments that are prefilled and compressed one after the other."""

from fairkv_jax.compress.budgets import request_kv_config
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.config import EngineConfig, KVConfig, ModelConfig
from fairkv_jax.engine.prefill_chunking import PrefillChunking, repetitions_of
from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.request import Request, ValidatedRequest
from fairkv_jax.engine.scheduled_request import Segment


def segments_of(
    valid: ValidatedRequest,
    model: ModelConfig,
    config: EngineConfig,
    kv_config: KVConfig,
    instruction: RepeatInstruction | None = None,
) -> tuple[Segment, ...]:
    """Returns the segments of a prompt, which follow from the request alone.

    A prefix is compressed as the request that cached it says; what follows it, by `kv_suffix`.
    `instruction` is how the model is told to repeat a prompt, where the engine's method needs it.
    """

    def segment(
        start: int,
        stop: int,
        request: Request,
        *,
        prefix: Prefix | None = None,
        keeps_whole: bool = False,
    ) -> Segment:
        wants_logprobs = request.sampling_params.prompt_logprobs is not None
        options = KVConfig()
        if not keeps_whole:
            options = request_kv_config(
                kv_config, request.kv_policy, request.kv_budget, request.kv_ratio
            )
        chunking = PrefillChunking.of(
            stop - start,
            model,
            config,
            wants_logprobs=wants_logprobs,
            repetitions=repetitions_of(stop - start, model, options, instruction),
        )
        return Segment(
            start,
            stop,
            chunking.work(model),
            chunking.num_cache_chunks,
            prefix,
            request.kv_policy,
            request.kv_budget,
            request.kv_ratio,
            keeps_whole,
        )

    request, record, stop = valid.request, valid.prefix, len(valid.request.prompt_token_ids)
    if record is None:
        return (segment(0, stop, request),)
    start = record.prefix.num_tokens
    first = segment(0, start, record.request, prefix=record.prefix)
    if request.caches_prefix:
        return (first,)
    return first, segment(start, stop, request, keeps_whole=kv_config.suffix == "keep")
