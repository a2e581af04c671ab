"""What the options of a request make of its logits, from vLLM's documentation, in float64."""

from collections.abc import Collection, Sequence

import numpy as np

from fairkv_jax.sampling_params import SamplingParams


def adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    ends: Collection[int],
    allowed: Collection[int] | None = None,
) -> np.ndarray:
    """One row's logits before the temperature, token by token, in vLLM's order of steps.

    `ends` are the ids that end a text, `allowed` those that a row which follows a grammar may draw.
    """
    row = [float(x) for x in logits]
    if params.structured_outputs and allowed is not None:
        row = [x if token in allowed else -np.inf for token, x in enumerate(row)]
    for token, bias in dict(params.logit_bias or {}).items():
        row[token] += bias
    if len(output) < params.min_tokens:
        for token in (*ends, *(params.stop_token_ids or ())):
            row[token] = -np.inf
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(output):
        count = list(output).count(token)
        row[token] -= params.frequency_penalty * count + params.presence_penalty
    return np.array(row)
