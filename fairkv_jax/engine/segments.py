"""Divides a prompt into the segments that are prefilled and compressed one after the other.

Where segments end, and what is kept of each, follows from the request alone: from the prefix that
it names, from the boundaries of its prompt, and from its KV options. A segment is compressed at its
own end, whether its cache is found or computed.
"""

from collections.abc import Sequence
from dataclasses import replace

from fairkv_jax.compress.budgets import request_kv_config
from fairkv_jax.compress.instruction import RepeatInstruction
from fairkv_jax.compress.registry import make_method
from fairkv_jax.config import EngineConfig, KVConfig, ModelConfig
from fairkv_jax.engine.prefill_chunking import PrefillChunking, repetitions_of
from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.prefix_registry import PrefixRegistry, check_shareable, keeps_whole
from fairkv_jax.engine.request import Boundary, Part, Request, ValidatedRequest
from fairkv_jax.engine.scheduled_request import Segment


def divide(
    request: Request,
    start: int,
    stop: int,
    boundaries: Sequence[Boundary],
    model: ModelConfig,
    kv_config: KVConfig,
    min_tokens: int,
) -> tuple[Part, ...]:
    """Returns the parts of a prompt's tokens [start, stop), which follow a named prefix if any.

    All but the last end at a boundary, and have at least `min_tokens` tokens. The first part of a
    prompt and those that end at a mark are compressed as the request says, answers are kept whole,
    and the others are treated as `kv_suffix` says.

    A part that is compressed by what looks at its end is not for other requests, so no part ends
    there.

    Raises:
        ValueError: the client has marked the end of such a part.
    """
    own = request_kv_config(kv_config, request.kv_policy, request.kv_budget, request.kv_ratio)
    keeps_suffix = kv_config.suffix == "keep"

    def part(stop: int, *, is_marked: bool = False, is_answer: bool = False) -> Part:
        is_kept = is_answer or (keeps_suffix and last > 0 and not is_marked)
        is_kept = is_kept or keeps_whole(own, stop - last, model)
        return Part(last, stop, KVConfig() if is_kept else own)

    parts, last, before = [], start, start
    for each in boundaries:
        is_answer, before = each.ends_answer and before == last, each.position
        if each.position >= stop or each.position - last < min_tokens:
            continue
        new = part(each.position, is_marked=each.is_marked, is_answer=is_answer)
        if not new.is_whole and not make_method(own).is_query_agnostic:
            if each.is_marked:
                check_shareable(own, kv_config, new.stop - new.start, model)
            continue
        parts.append(new)
        last = each.position
    return *parts, part(stop)


def segments_of(
    valid: ValidatedRequest,
    model: ModelConfig,
    config: EngineConfig,
    kv_config: KVConfig,
    prefixes: PrefixRegistry,
    instruction: RepeatInstruction | None = None,
) -> tuple[Segment, ...]:
    """Returns the segments of a prompt.

    A named prefix is compressed as the request that cached it says. `instruction` is how the model
    is told to repeat a prompt, where the engine's method needs it.
    """

    def segment(
        part: Part, request: Request, prefix: Prefix | None, *, keeps_whole: bool = False
    ) -> Segment:
        num_tokens = part.stop - part.start
        chunking = PrefillChunking.of(
            num_tokens,
            model,
            config,
            wants_logprobs=request.sampling_params.prompt_logprobs is not None,
            repetitions=repetitions_of(num_tokens, model, part.options, instruction),
        )
        return Segment(
            part.start,
            part.stop,
            chunking.work(model),
            chunking.num_cache_chunks,
            prefix,
            request.kv_policy,
            request.kv_budget,
            request.kv_ratio,
            keeps_whole,
        )

    request, record, segments, parent = valid.request, valid.prefix, [], None
    if record is not None:
        cached, parent = record.request, record.prefix
        options = request_kv_config(kv_config, cached.kv_policy, cached.kv_budget, cached.kv_ratio)
        segments.append(segment(Part(0, parent.num_tokens, options), cached, parent))
    for part in valid.parts:
        is_last = part is valid.parts[-1]
        if not is_last:
            parent = prefixes.after(parent, request, part)
        prefix = None if is_last else parent
        segments.append(segment(part, request, prefix, keeps_whole=part.is_whole))
    return tuple(segments)


def finished_turn(
    valid: ValidatedRequest,
    answer: Sequence[int],
    model: ModelConfig,
    config: EngineConfig,
    kv_config: KVConfig,
    prefixes: PrefixRegistry,
) -> list[Prefix]:
    """Returns the prefixes of the next turn's prompt that the row of a finished answer holds.

    The next prompt has boundaries before and behind the answer, whose last token belongs to what
    follows, see `conversation`. Its segments must keep what the row has kept: the prompt's parts,
    and the answer whole. Where a short part joins others and is compressed with them, they do not.
    """
    request, record = valid.request, valid.prefix
    end = len(request.prompt_token_ids)
    stop = end + max(len(answer) - 1, 0)
    start = 0 if record is None else record.prefix.num_tokens
    following = replace(request, prompt_token_ids=[*request.prompt_token_ids, *answer])
    boundaries = (
        *request.boundaries,
        Boundary(end),
        *([Boundary(stop, ends_answer=True)] if stop > end else []),
    )
    *parts, _ = divide(
        request, start, stop + 1, boundaries, model, kv_config, config.prefix_min_tokens
    )
    row = [*valid.parts, Part(end, stop, KVConfig())]
    compressed_until = max((each.stop for each in row if not each.is_whole), default=start)
    found, parent = [], None if record is None else record.prefix
    for index, part in enumerate(parts, 1):
        parent = prefixes.after(parent, following, part)
        if part.stop >= compressed_until and _joined(parts[:index]) == _joined(row, part.stop):
            found.append(parent)
    return found


def _joined(parts: Sequence[Part], stop: int | None = None) -> list[Part]:
    """Returns the same parts up to `stop`; adjacent ones that are kept whole are one."""
    joined: list[Part] = []
    for part in parts:
        if stop is not None:
            part = replace(part, stop=min(part.stop, stop))
        if part.start >= part.stop:
            continue
        if joined and joined[-1].is_whole and part.is_whole:
            part = replace(part, start=joined.pop().start)
        joined.append(part)
    return joined
