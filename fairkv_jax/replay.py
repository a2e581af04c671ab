"""Replays a log of scheduler outputs: `python -m fairkv_jax.replay FILE`.

Executes what a server or an `LLM` executed, in the same order, and compares the tokens. Ends with 1
at the first token that differs. A log without prompts runs the same shapes with made-up tokens, and
nothing is compared.
"""

import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from absl import app, flags

from fairkv_jax.command_line import with_underscores
from fairkv_jax.engine.schedule_log import Header, LoggedTokens, read_log
from fairkv_jax.engine.scheduler_output import SchedulerOutput

_MODEL = flags.DEFINE_string(
    "model", None, "Checkpoint to run; default: the model that the log names."
)


@dataclass
class Counts:
    """What has been replayed."""

    outputs: int = 0
    tokens: int = 0
    """Tokens that were compared."""


class TokensDiffer(Exception):
    """A replayed token is not the logged one."""


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("give one schedule log: python -m fairkv_jax.replay FILE")
    try:
        lines = read_log(argv[1])
        header = next(lines)
        assert isinstance(header, Header)
        devices = header.engine_config.tensor_parallel_size
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        counts = replay(header, lines, _MODEL.value or header.model)
    except StopIteration:
        sys.exit(f"{argv[1]} is empty")
    except ValueError as error:
        sys.exit(f"cannot replay: {error}")
    except TokensDiffer as error:
        sys.exit(f"tokens differ: {error}")
    said = f"{counts.tokens} tokens equal" if header.has_prompts else "nothing to compare"
    print(f"replayed {counts.outputs} outputs: {said}")


def replay(
    header: Header,
    lines: Iterator[Header | SchedulerOutput | LoggedTokens],
    model: str | Path,
) -> Counts:
    """Executes the outputs of a log and compares their tokens.

    Raises:
        ValueError: the model is not the log's, or the devices do not suffice.
        TokensDiffer: at the first difference.
    """
    import numpy as np

    from fairkv_jax.checkpoint import open_checkpoint
    from fairkv_jax.engine.model_runner import ModelRunner
    from fairkv_jax.engine.schedule_log import fingerprint, tokens_of

    checkpoint = open_checkpoint(model)
    found = fingerprint(checkpoint)
    if found != header.fingerprint:
        raise ValueError(
            f"the log was written with a checkpoint {header.model} of fingerprint "
            f"{header.fingerprint[:12]}, {model} has {found[:12]}: name the right one by --model"
        )
    runner = ModelRunner(
        checkpoint,
        header.plan,
        header.engine_config,
        header.kv_config,
        eos_token_ids=checkpoint.tokenizer().eos_token_ids,
    )
    if not header.has_prompts:
        print("the log holds no prompts: running the same shapes with made-up tokens")
    rng, counts = np.random.default_rng(0), Counts()
    computed: deque[LoggedTokens] = deque()
    for line in lines:
        if isinstance(line, SchedulerOutput):
            output = line if header.has_prompts else _make_up(line, rng, checkpoint)
            result = runner.execute(output).result()
            if header.has_prompts:
                computed.append(tokens_of(output, result))
            counts.outputs += 1
        elif isinstance(line, LoggedTokens):
            while computed[0].index < line.index:
                computed.popleft()  # the log ends before its result, or a step failed
            counts.tokens += _compare(line, computed.popleft())
    return counts


def _compare(logged: LoggedTokens, computed: LoggedTokens) -> int:
    """How many tokens are equal; raises TokensDiffer unless all are."""
    if logged.index != computed.index:
        raise ValueError(f"the result of output {logged.index} follows {computed.index}")
    if logged.first_token != computed.first_token:
        raise TokensDiffer(
            f"output {logged.index}, the first token after a prompt: "
            f"{computed.first_token}, the log has {logged.first_token}"
        )
    for step, (want, got) in enumerate(zip(logged.tokens, computed.tokens, strict=True)):
        for at, (one, two) in enumerate(zip(want, got, strict=True)):
            if one != two:
                raise TokensDiffer(
                    f"output {logged.index}, step {step}, row {at + 1} of the batch: {two}, "
                    f"the log has {one}"
                )
    return sum(map(len, logged.tokens)) + (logged.first_token is not None)


def _make_up(output: SchedulerOutput, rng, checkpoint) -> SchedulerOutput:
    """The same work with random prompts."""
    prefill = output.prefill
    if prefill is None or prefill.new_request is None:
        return output
    size = len(prefill.new_request.prompt_token_ids)
    tokens = rng.integers(0, checkpoint.config.vocab_size, size).tolist()
    new = replace(prefill.new_request, prompt_token_ids=tokens)
    return replace(output, prefill=replace(prefill, new_request=new))


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
