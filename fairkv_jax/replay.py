"""Replays a schedule log: `python -m fairkv_jax.replay FILE [--model MODEL]`.

It executes what a server or an `LLM` executed with `schedule_log`, in the same order, and compares
the tokens. The exit status is 1 if a token differs or the log cannot be replayed. For a log without
prompts, it executes the same shapes with made-up tokens, and compares nothing.
"""

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import app, flags

from fairkv_jax.checkpoint import Checkpoint, open_checkpoint
from fairkv_jax.command_line import make_cpu_devices, with_underscores
from fairkv_jax.engine.schedule_log import (
    Header,
    LogEntry,
    LoggedTokens,
    fingerprint,
    read_log,
    tokens_of,
)
from fairkv_jax.engine.scheduler_output import SchedulerOutput

if TYPE_CHECKING:
    from fairkv_jax.engine.model_runner import ModelRunner


@dataclass
class Counts:
    """How much has been replayed."""

    num_outputs: int = 0
    num_tokens: int = 0
    """Tokens that were compared, and were equal."""


class TokensDiffer(Exception):
    """A replayed token is not the logged one."""


def main(argv: list[str], model: str | None) -> None:
    """Replays the log that the command line names, and prints what was compared."""
    if len(argv) != 2:
        raise app.UsageError("give one schedule log: python -m fairkv_jax.replay FILE")
    try:
        header, entries = open_log(argv[1])
        make_cpu_devices(header.engine_config.tensor_parallel_size)
        counts = replay(header, entries, model)
    except ValueError as error:
        sys.exit(f"cannot replay {argv[1]}: {error}")
    except TokensDiffer as error:
        sys.exit(f"{argv[1]}: tokens differ: {error}")
    except RuntimeError as error:
        from fairkv_jax.engine.device_errors import DeviceError

        if not isinstance(error, DeviceError):
            raise
        sys.exit(f"cannot replay {argv[1]}: {error}")
    compared = f"{counts.num_tokens} tokens, all equal" if header.has_prompts else "no tokens"
    print(f"replayed {counts.num_outputs} outputs and compared {compared}")


def open_log(path: str | Path) -> tuple[Header, Iterator[LogEntry]]:
    """Returns the header of a log, and an iterator over the entries that follow it.

    Raises:
        ValueError: the file cannot be read, is empty, or does not begin with a header.
    """
    entries = read_log(path)
    header = next(entries, None)
    if not isinstance(header, Header):
        raise ValueError("the file is empty")
    return header, entries


def replay(header: Header, entries: Iterator[LogEntry], model: str | Path | None = None) -> Counts:
    """Executes the outputs of a log and compares their tokens.

    Args:
        entries: what follows the header.
        model: the checkpoint; None: the one that the header names.

    Raises:
        ValueError: the model is not the log's, there are too few devices, or the entries of the log
            contradict each other.
        TokensDiffer: at the first token that differs.
        DeviceError: the devices failed, or have too little memory.
    """
    checkpoint = _open_model(header, model)
    runner = _make_runner(header, checkpoint)
    if not header.has_prompts:
        print("the log holds no prompts: executing the same shapes with made-up tokens")
    rng, counts = np.random.default_rng(0), Counts()
    computed: deque[LoggedTokens] = deque()
    for entry in entries:
        if isinstance(entry, SchedulerOutput):
            output = entry
            if not header.has_prompts:
                output = _with_made_up_prompt(entry, rng, checkpoint.config.vocab_size)
            computed.append(_execute(runner, output))
            counts.num_outputs += 1
        elif isinstance(entry, LoggedTokens):
            counts.num_tokens += _compare(entry, computed)
        if not header.has_prompts:
            computed.clear()
    return counts


def _open_model(header: Header, model: str | Path | None) -> Checkpoint:
    """Opens the checkpoint and checks that it is the one that the log was written with."""
    checkpoint = open_checkpoint(header.model if model is None else model)
    found = fingerprint(checkpoint)
    if found != header.fingerprint:
        raise ValueError(
            f"the log was written with a checkpoint of fingerprint {header.fingerprint[:12]}, at "
            f"{header.model}, but {model or header.model} has {found[:12]}: give the right one by "
            "--model"
        )
    return checkpoint


def _make_runner(header: Header, checkpoint: Checkpoint) -> "ModelRunner":
    """Makes a runner like the one whose outputs were logged."""
    import jax

    from fairkv_jax.engine.model_runner import ModelRunner

    platform = jax.default_backend()
    if platform != header.platform:
        print(
            f"the log was written on {header.platform} and is replayed on {platform}: tokens may "
            "differ because of rounding"
        )
    return ModelRunner(
        checkpoint,
        header.plan,
        header.engine_config,
        header.kv_config,
        eos_token_ids=checkpoint.tokenizer().eos_token_ids,
    )


def _execute(runner: "ModelRunner", output: SchedulerOutput) -> LoggedTokens:
    """Executes an output and waits for its tokens."""
    from fairkv_jax.engine.device_errors import STEP_DOES_NOT_FIT, translate_xla_errors

    with translate_xla_errors(f"executing output {output.index}", STEP_DOES_NOT_FIT):
        return tokens_of(output, runner.execute(output).result())


def _compare(logged: LoggedTokens, computed: deque[LoggedTokens]) -> int:
    """Returns how many tokens are equal, after dropping what was computed up to this result."""
    while computed and computed[0].index < logged.index:
        computed.popleft()  # its result is not in the log
    if not computed or computed[0].index != logged.index:
        raise ValueError(f"the log has a result of output {logged.index}, but not the output")
    mine = computed.popleft()
    if [len(step) for step in logged.tokens] != [len(step) for step in mine.tokens]:
        raise ValueError(f"the result of output {logged.index} does not have the output's rows")
    if logged.first_token != mine.first_token:
        raise TokensDiffer(
            f"the token after the prompt in output {logged.index} is {mine.first_token}, but "
            f"{logged.first_token} in the log"
        )
    if logged.other_first_tokens != mine.other_first_tokens:
        raise TokensDiffer(
            f"the tokens after the prompt in output {logged.index} are {mine.other_first_tokens}, "
            f"but {logged.other_first_tokens} in the log"
        )
    for step, tokens in enumerate(logged.tokens):
        for place, token in enumerate(tokens):
            if token != mine.tokens[step][place]:
                raise TokensDiffer(
                    f"in output {logged.index}, step {step}, the token of the decoded row number "
                    f"{place} is {mine.tokens[step][place]}, but {token} in the log"
                )
    num_first = (logged.first_token is not None) + len(logged.other_first_tokens)
    return sum(map(len, logged.tokens)) + num_first


def _with_made_up_prompt(
    output: SchedulerOutput, rng: np.random.Generator, vocab_size: int
) -> SchedulerOutput:
    """Returns the same work with random tokens in the prompt that it begins, if it begins one."""
    prefill = output.prefill
    if prefill is None or prefill.new_request is None:
        return output
    num_tokens = len(prefill.new_request.prompt_token_ids)
    tokens = rng.integers(0, vocab_size, num_tokens).tolist()
    new = replace(prefill.new_request, prompt_token_ids=tokens)
    return replace(output, prefill=replace(prefill, new_request=new))


if __name__ == "__main__":
    # Defined only here: flags are global, and other programs have a flag of this name.
    flag = flags.DEFINE_string(
        "model", None, "Checkpoint to run. Default: the one that the log names."
    )
    app.run(
        lambda argv: main(argv, flag.value),
        argv=[with_underscores(argument) for argument in sys.argv],
    )
