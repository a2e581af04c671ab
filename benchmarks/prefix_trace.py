"""What a prefix cache saves on a trace of real requests.

    python -m benchmarks.prefix_trace --trace FILE

The trace is Mooncake's of conversations (github.com/kvcache-ai/Mooncake, FAST'25) as a NumPy file:
`prompt_tokens`, `output_tokens`, and the ids of each prompt's blocks of 512 tokens, request i's
being `block_ids[block_offsets[i]:block_offsets[i + 1]]`. Equal ids at the start of two prompts are
a shared beginning. The scheduler, the account of the KV cache and the prefix cache are those that
serve; the model is replaced by the lengths that it would keep, of one head that stands for all.

A segment ends where another prompt of the trace ends or goes on differently: that is where messages
end. Segments are compressed at their own ends by `kv_ratio`. Requests come in the order of the
trace, always a few more than there are rows, so that the cache is full.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from absl import app, flags

from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.scheduled_request import ScheduledRequest, Segment
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.engine.scheduler_output import (
    ExecutionResult,
    KeptTokens,
    NewRequest,
    PrefillResult,
    SampledTokens,
    SchedulerOutput,
)
from fairkv_jax.engine.timings import Timings
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.sharding.slots import SlotLayout

BLOCK = 512
_TIMINGS = Timings(step_seconds=0.03, prefill_work_per_second=200_000.0)
"""Seconds of a decode step, and prompt tokens per second; only their product matters here. Prompts
are read so fast that memory decides how many requests run."""
_WAITING = 4
"""Requests that wait beyond those that run."""
_PARAMS = SamplingParams()


@dataclass(frozen=True)
class Trace:
    """The requests of a trace, in the order of their arrival."""

    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    blocks: list[tuple[int, ...]]
    """The ids of each prompt's blocks; the last one may be incomplete."""

    @classmethod
    def read(cls, path: str, num_requests: int | None) -> "Trace":
        """Reads the first requests of a file; None: all.

        Raises:
            ValueError: the file is no such trace.
        """
        last = None if num_requests is None else num_requests + 1
        try:
            with np.load(path) as arrays:
                offsets = arrays["block_offsets"][:last]
                ids = arrays["block_ids"]
                blocks = [tuple(ids[start:stop].tolist()) for start, stop in pairwise(offsets)]
                prompts, outputs = arrays["prompt_tokens"], arrays["output_tokens"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is not a trace with prompt_tokens, output_tokens, block_ids and "
                f"block_offsets ({error}): give Mooncake's conversation trace as .npz"
            ) from error
        return cls(prompts[: len(blocks)], np.maximum(outputs[: len(blocks)], 1), blocks)


@dataclass(frozen=True)
class Outcome:
    """What one run over the trace has come to."""

    kv_ratio: float
    caches: bool
    hit_rate: float
    """Prompt tokens found, of all; at the first prefill of each request."""
    prefilled_tokens: int
    """Also those that are read again after a preemption."""
    prompt_tokens: int
    mean_rows: float
    """Running requests, averaged over decode steps."""
    most_rows: int
    preemptions: int
    decode_steps: int

    @property
    def saved(self) -> float:
        """Prompt tokens that were not read, of all."""
        return 1 - self.prefilled_tokens / self.prompt_tokens


class Segmentation:
    """Where the segments of prompts end, and the prefixes that end there."""

    def __init__(self, trace: Trace):
        children: dict[tuple[int, int], set[int]] = {}
        self._nodes: list[list[int]] = []
        """For each request the trie's node behind each of its complete blocks."""
        known: dict[tuple[int, int], int] = {}
        ends = set()
        for blocks, num_tokens in zip(trace.blocks, trace.prompt_tokens, strict=True):
            node, path = 0, []
            for block in blocks[: int(num_tokens) // BLOCK]:
                children.setdefault((node, 0), set()).add(block)
                node = known.setdefault((node, block), len(known) + 1)
                path.append(node)
            ends.add(node)
            self._nodes.append(path)
        self._ends = ends | {node for (node, _), after in children.items() if len(after) > 1}
        self._prefixes: dict[int, Prefix] = {}

    def segments(self, index: int, num_tokens: int, *, caches: bool) -> tuple[Segment, ...]:
        """The segments of a request's prompt; one, if nothing is cached."""
        segments, start, parent = [], 0, None
        for count, node in enumerate(self._nodes[index], 1):
            stop = count * BLOCK
            if not caches or node not in self._ends or stop >= num_tokens:
                continue
            if node not in self._prefixes:
                self._prefixes[node] = Prefix(str(node), stop, parent)
            parent = self._prefixes[node]
            segments.append(_segment(start, stop, parent))
            start = stop
        return *segments, _segment(start, num_tokens, None)


def _segment(start: int, stop: int, prefix: Prefix | None) -> Segment:
    sizes = np.full(-(-(stop - start) // BLOCK), float(BLOCK))
    return Segment(start, stop, sizes, len(sizes), prefix)


def simulate(
    trace: Trace, kv_ratio: float, *, caches: bool, cache_tokens: int, rows: int
) -> Outcome:
    """Runs the trace through the scheduler, with memory for `cache_tokens` uncompressed tokens."""
    scheduler = Scheduler(
        _manager(trace, cache_tokens, rows), lambda name: np.zeros(1, np.uint32), 1.0
    )
    requests = _requests(trace, Segmentation(trace), caches=caches)
    upcoming = next(requests, None)
    cached: dict[str, int] = {}
    counts = np.zeros(3, np.int64)  # prefilled tokens, rows over all steps, steps
    most_rows = segment = 0
    while upcoming is not None or len(scheduler):
        while upcoming is not None and len(scheduler.waiting) < _WAITING:
            scheduler.add(upcoming)
            upcoming = next(requests, None)
        output = scheduler.schedule(_TIMINGS)
        assert output is not None, "nothing is in flight, so something can be done"
        if output.prefill is not None and output.prefill.new_request is not None:
            counts[0] += len(output.prefill.new_request.prompt_token_ids)
            segment = len(output.prefill.new_request.prompt_token_ids)
        if output.decode is not None:
            counts[1] += len(output.decode.rows) * output.decode.num_steps
            counts[2] += output.decode.num_steps
            most_rows = max(most_rows, len(output.decode.rows))
        for new in scheduler.update(output, _result(output, segment, kv_ratio, rows)):
            if new.prefill is not None:
                cached[new.request_id] = new.num_cached_tokens
            row = scheduler.row_of(new.request_id)
            if row is not None:
                request = scheduler.running[row]
                if len(request.output_token_ids) >= request.max_tokens:
                    scheduler.abort(new.request_id)
        for request in [each for each in scheduler.waiting if each.max_tokens == 1]:
            if request.output_token_ids:
                scheduler.abort(request.request_id)
    prompts = int(trace.prompt_tokens.sum())
    return Outcome(
        kv_ratio,
        caches,
        sum(cached.values()) / prompts,
        int(counts[0]),
        prompts,
        float(counts[1] / counts[2]),
        most_rows,
        scheduler.num_preemptions,
        int(counts[2]),
    )


def _manager(trace: Trace, cache_tokens: int, rows: int) -> KVCacheManager:
    plan = make_plan(Profile("", "full", 1, ((1.0,),)), 1, "static")
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    spec = KVCacheSpec(
        num_layers=1,
        num_rows=rows,
        num_devices=1,
        slots_per_device=1,
        head_dim=128,
        page_size=16,
        pages_per_device=cache_tokens // 16,
        max_tokens=longest,
        sharing=8,
    )
    if longest > cache_tokens:
        raise ValueError(
            f"--cache-tokens {cache_tokens} cannot hold the longest request, {longest} tokens: "
            "raise it"
        )
    return KVCacheManager(spec, SlotLayout.from_plan(plan))


def _requests(
    trace: Trace, segmentation: Segmentation, *, caches: bool
) -> Iterator[ScheduledRequest]:
    for index, num_tokens in enumerate(trace.prompt_tokens.tolist()):
        segments = segmentation.segments(index, num_tokens, caches=caches)
        tokens: list[int] = range(num_tokens)  # pyright: ignore[reportAssignmentType]  (nobody reads them)
        new = NewRequest(str(index), tokens, _PARAMS, 0)
        yield ScheduledRequest(new, index, int(trace.output_tokens[index]), segments)


def _result(output: SchedulerOutput, segment: int, kv_ratio: float, rows: int) -> ExecutionResult:
    """What the devices would answer; `segment` is the length of the one that is prefilled."""
    prefill = sampled = None
    if output.prefill is not None and output.prefill.is_last:
        kept = np.full((1, 1), max(1, int(segment * (1 - kv_ratio))), np.int32)
        first = _tokens(1, 1) if output.prefill.samples_token else None
        prefill = PrefillResult(KeptTokens(kept, None), first, None)
    if output.decode is not None:
        sampled = _tokens(output.decode.num_steps, rows)
    return ExecutionResult(prefill, sampled)


def _tokens(steps: int, rows: int) -> SampledTokens:
    zeros = np.zeros((steps, rows), int)
    return SampledTokens(zeros, zeros, zeros, zeros, zeros)


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Returns the table of all runs."""
    lines = [
        "| kv_ratio | prefix cache | prompt tokens found | prompt tokens not read | "
        "running rows, mean (most) | preemptions | decode steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        lines.append(
            f"| {each.kv_ratio} | {'on' if each.caches else 'off'} | {each.hit_rate:.1%} | "
            f"{each.saved:.1%} | {each.mean_rows:.1f} ({each.most_rows}) | {each.preemptions:,} | "
            f"{each.decode_steps:,} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options begin with --")
    trace = Trace.read(_TRACE.value, _REQUESTS.value)
    outcomes = []
    for ratio in map(float, _RATIOS.value):
        for caches in (False, True):
            outcomes.append(
                simulate(
                    trace,
                    ratio,
                    caches=caches,
                    cache_tokens=_CACHE_TOKENS.value,
                    rows=_ROWS.value,
                )
            )
            print(as_markdown(outcomes[-1:]).splitlines()[-1], flush=True)
    print(as_markdown(outcomes))
    if _OUTPUT.value:
        record = {
            "requests": len(trace.blocks),
            "cache_tokens": _CACHE_TOKENS.value,
            "rows": _ROWS.value,
            "outcomes": [{**asdict(each), "saved": each.saved} for each in outcomes],
        }
        Path(_OUTPUT.value).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _TRACE = flags.DEFINE_string("trace", None, "Path of the trace.", required=True)
    _REQUESTS = flags.DEFINE_integer("requests", None, "Take only so many of its first requests.")
    _RATIOS = flags.DEFINE_list("ratios", ["0", "0.5", "0.8"], "Fractions that are removed.")
    _CACHE_TOKENS = flags.DEFINE_integer(
        "cache_tokens", 400_000, "Tokens that the KV cache holds uncompressed."
    )
    _ROWS = flags.DEFINE_integer("rows", 256, "Most requests that run at the same time.")
    _OUTPUT = flags.DEFINE_string("output", None, "Path of a JSON file for the figures.")
    app.run(main)
