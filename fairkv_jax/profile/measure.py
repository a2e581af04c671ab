"""Measures a head profile: prefills prompts and records the number of tokens kept per head."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.plan import (
    STRATEGIES,
    CostModel,
    ModelShape,
    Profile,
    Workload,
    make_plan,
    simulate,
)

HELD_OUT_BATCH = 16


def measure_lengths(
    runner: ModelRunner, prompts: Sequence[list[int]], log: Path, *, progress: bool = True
) -> np.ndarray:
    """Returns the kept tokens [prompts, L, K] of the prompts, in their order.

    Every result is appended to `log` at once, so that an interrupted measurement can be resumed.
    Entries of other configurations in the log are ignored.
    """
    known = dict(_read_log(log))
    with log.open("a", encoding="utf-8") as file:
        for prompt in tqdm(prompts, "prompts", disable=not progress):
            key = _key(runner, prompt)
            if key not in known:
                known[key] = np.asarray(runner.prefill(prompt).head_lengths).tolist()
                file.write(json.dumps({"key": key, "tokens": known[key]}) + "\n")
                file.flush()
    return np.array([known[_key(runner, prompt)] for prompt in prompts])


def make_profile(
    runner: ModelRunner, model: str, prompts: Sequence[list[int]], lengths: np.ndarray, devices: int
) -> Profile:
    """Makes a profile of measured lengths, with each strategy's utilization on held-out prompts."""
    config = runner.kv_config
    fields = {
        "model": model,
        "policy": config.policy,
        "budget": config.budget,
        "prompt_tokens": float(np.mean([len(prompt) for prompt in prompts])),
        "source": f"measured on {len(prompts)} prompts",
        "shape": ModelShape.from_config(runner.model_config),
    }
    held_out = ()
    if len(prompts) > 1:
        half = Profile.from_samples(lengths[::2], **fields)
        held_out = tuple(held_out_utilization(half, lengths[1::2], devices).items())
    return Profile.from_samples(lengths, held_out=held_out, **fields)


def held_out_utilization(profile: Profile, lengths: np.ndarray, devices: int) -> dict[str, float]:
    """Returns the utilization of each strategy when plans for `profile` serve other prompts.

    The utilization is simulated at a full batch of 16 and counts cached tokens only, not weights.
    Rows are routed by load; for `fair_copying`, also by the plan's shares alone.

    Args:
        lengths: [prompts, L, K] kept tokens of the other prompts.
    """
    assert profile.shape is not None
    cost = CostModel.of(profile.shape, devices, batch=HELD_OUT_BATCH)
    requests = 16 * HELD_OUT_BATCH
    workload = Workload.drawn(lengths, requests, rate=HELD_OUT_BATCH, new_tokens=100)

    def utilization(strategy: str, *, routed: bool = True) -> float:
        plan = make_plan(profile, devices, strategy, cost=cost)
        trace = simulate(plan, workload, HELD_OUT_BATCH, routed=routed)
        full = trace.rows == HELD_OUT_BATCH
        return round(float(np.average(trace.token_balance[full], weights=trace.seconds[full])), 4)

    result = {f"{strategy} on {devices}": utilization(strategy) for strategy in STRATEGIES}
    unrouted = utilization("fair_copying", routed=False)
    return result | {f"fair_copying, not routed, on {devices}": unrouted}


def _key(runner: ModelRunner, prompt: list[int]) -> str:
    """Returns a hash of the configuration and the prompt, which identifies a log entry."""
    text = f"{runner.model_config} {runner.kv_config} {runner.config.dtype} {prompt}"
    return hashlib.sha256(text.encode()).hexdigest()


def _read_log(log: Path) -> list[tuple[str, list]]:
    """Returns the log's valid entries; an entry that was written incompletely is ignored."""
    records = []
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                records.append((record["key"], record["tokens"]))
            except (ValueError, KeyError, TypeError):
                continue
    return records
