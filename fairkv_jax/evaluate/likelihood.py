"""Likelihood of a text over a compressed context: its NLL, and its KL divergence from full.

    passage    [ context, compressed | one token that is given | tokens that are scored ]
                                       `- every token sees the kept context and the tokens before

The token right after the context is not scored: a prefill predicts it before it compresses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from fairkv_jax.engine.execution import Execution
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.engine.prefill_chunking import PrefillChunking
from fairkv_jax.engine.scheduler_output import (
    Insertion,
    NewRequest,
    PrefillChunks,
    RowPrefix,
    SchedulerOutput,
)
from fairkv_jax.evaluate.user_data import SCORED_TOKENS
from fairkv_jax.prefill import logits_of
from fairkv_jax.sampling_params import SamplingParams

_BLOCK = 32
"""Positions whose distributions are in float64 at a time."""


@dataclass(frozen=True)
class Likelihood:
    """Means over the scored tokens, in nats."""

    nll: float
    """Negative log-likelihood of a token."""
    kl: float
    """KL(full || compressed) of the distributions of a token, over the whole vocabulary."""
    kept: float
    """Fraction of the context that a head keeps on average."""


class LikelihoodMeter:
    """Measures one passage at several ratios; it empties the runner's KV cache.

    Raises:
        ValueError: the passage is longer than `max_model_len`.
    """

    def __init__(self, runner: ModelRunner, passage: Sequence[int]):
        if len(passage) > runner.config.max_model_len:
            raise ValueError(
                f"a passage of {len(passage)} tokens exceeds max_model_len "
                f"{runner.config.max_model_len}: lower --lengths, or raise --max-model-len"
            )
        end = len(passage) - 1 - SCORED_TOKENS
        self._runner = runner
        self._context, self._suffix = list(passage[:end]), list(passage[end:-1])
        self._targets = np.asarray(passage[end + 1 :])

    def measure(self, ratio: float | None) -> Likelihood:
        """Compresses the context at that ratio, None: not at all, and scores what follows."""
        logits, kept = self.logits(ratio)
        divergence = 0.0 if ratio is None else kl(self._full_logits, logits)
        return Likelihood(self.nll(logits), divergence, kept)

    def logits(self, ratio: float | None) -> tuple[Float[np.ndarray, "T V"], float]:
        """Returns the logits of the scored tokens, and the fraction of the context that is kept."""
        if ratio is None:
            return self._full_logits, 1.0
        prefix, kept = self._insert(ratio)
        request = NewRequest("", self._suffix, SamplingParams(), 0, keeps_whole=True)
        return self._logits(request, 0, prefix), kept / len(self._context)

    def nll(self, logits: Float[np.ndarray, "T V"]) -> float:
        """Returns the mean negative log-likelihood of the scored tokens, in nats."""
        losses = [
            -_log_softmax(logits[at : at + _BLOCK])[np.arange(len(part)), part].sum()
            for at in range(0, len(self._targets), _BLOCK)
            for part in [self._targets[at : at + _BLOCK]]
        ]
        return float(sum(losses)) / len(self._targets)

    @cached_property
    def _full_logits(self) -> Float[np.ndarray, "T V"]:
        """Logits over the whole context: those of one prefill, during which nothing is dropped."""
        request = NewRequest("", [*self._context, *self._suffix], SamplingParams(), 0)
        return self._logits(request, len(self._context), None)

    def _logits(
        self, request: NewRequest, start: int, prefix: RowPrefix | None
    ) -> Float[np.ndarray, "T V"]:
        """Runs a prompt and returns the logits of the scored tokens, from position `start` on."""
        runner = self._runner
        task = runner.start_prefill(request, cached_prefix=prefix)
        runner.run_chunks(task, 0, task.shape.num_chunks)
        hidden, at = task.carry.hidden, np.int32(start)
        logits = logits_of(runner.model, hidden, at, mesh=runner.mesh, block=SCORED_TOKENS)
        return np.asarray(logits)

    def _insert(self, ratio: float) -> tuple[RowPrefix, float]:
        """Puts the compressed context into the first row; also returns the tokens kept per head."""
        runner, context = self._runner, self._context
        runner.reset()
        manager = KVCacheManager(runner.cache_spec, runner.layout)
        request = NewRequest("context", context, SamplingParams(), 0, kv_ratio=ratio)
        chunks = PrefillChunking.of(
            len(context), runner.model_config, runner.config, wants_logprobs=False
        ).num_chunks
        prefill = PrefillChunks(request.request_id, 0, chunks, chunks, 1.0, request)
        result = self._execute(manager, prefill=prefill).result().prefill
        assert result is not None
        lengths = manager.reserve_prompt(0, result.kept.lengths)
        if lengths is None:
            raise ValueError(
                f"the KV cache does not hold the {len(context)} tokens of a passage: raise "
                "--kv-cache-memory-bytes"
            )
        insertion = Insertion(request.request_id, 0, lengths, [], is_last=False)
        self._execute(manager, insertion=insertion)
        return RowPrefix(0, context, lengths), float(result.kept.lengths.mean())

    def _execute(
        self,
        manager: KVCacheManager,
        *,
        prefill: PrefillChunks | None = None,
        insertion: Insertion | None = None,
    ) -> Execution:
        output = SchedulerOutput(
            index=0,
            resets_cache=False,
            preempted_request_ids=(),
            finished_request_ids=(),
            released_rows=(),
            page_table_update=manager.take_page_table_update(),
            insertion=insertion,
            prefill=prefill,
            decode=None,
        )
        return self._runner.execute(output)


def kl(full: Float[np.ndarray, "T V"], other: Float[np.ndarray, "T V"]) -> float:
    """Returns the mean of KL(full || other), in nats."""
    total = 0.0
    for at in range(0, len(full), _BLOCK):
        p, q = (_log_softmax(logits[at : at + _BLOCK]) for logits in (full, other))
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(full)


def _log_softmax(logits: np.ndarray) -> Float[np.ndarray, "T V"]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
