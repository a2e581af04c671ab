"""A log of everything that an engine executed, as JSON lines, which can be replayed.

    {"header": {...}}                    versions, the model's fingerprint, plan, configurations
    {"output": {"index": 0, ...}}        a `SchedulerOutput`, when it is given to the devices
    {"result": {"index": 0, ...}}        the tokens that came of it, when they are read

Replaying the outputs gives the same tokens: a bug report carries such a log. Prompts, and with them
the tokens, are in it only where that is asked for; sampling options always are.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.page_tables import PageTableUpdate
from fairkv_jax.engine.scheduler_output import (
    Decode,
    DecodeRow,
    ExecutionResult,
    Insertion,
    NewRequest,
    PrefillChunks,
    SchedulerOutput,
)
from fairkv_jax.plan import Plan
from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams

FORMAT = 1
_CLASSES = {
    cls.__name__: cls
    for cls in (
        Decode,
        DecodeRow,
        Insertion,
        NewRequest,
        PageTableUpdate,
        PrefillChunks,
        SamplingParams,
        SchedulerOutput,
        StructuredOutputsParams,
    )
}


@dataclass(frozen=True)
class Header:
    """What the engine was, so that another one can be made like it."""

    model: str
    fingerprint: str
    plan: Plan
    engine_config: EngineConfig
    kv_config: KVConfig
    has_prompts: bool
    version: str = version("fairkv-jax")


@dataclass(frozen=True)
class LoggedTokens:
    """The tokens of one output."""

    index: int
    first_token: int | None
    """The token that followed the prompt, where one was sampled."""
    tokens: list[list[int]]
    """For each decode step the tokens of the decoded rows, in the order of `Decode.rows`."""


class ScheduleLog:
    """Writes a log as it happens; every line is flushed.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: str | Path, header: Header):
        self._has_prompts = header.has_prompts
        try:
            self._file: IO[str] = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"the schedule log {path} cannot be written: {error}") from error
        record = asdict(header) | {"format": FORMAT, "plan": json.loads(header.plan.to_json())}
        self._write("header", record)

    def write_output(self, output: SchedulerOutput) -> None:
        """Notes an output, without the prompts where these are not asked for."""
        if not self._has_prompts:
            output = _without_tokens(output)
        self._write("output", _encode(output))

    def write_result(self, output: SchedulerOutput, result: ExecutionResult) -> None:
        """Notes the tokens of an output."""
        if self._has_prompts:
            self._write("result", asdict(tokens_of(output, result)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, kind: str, record: Any) -> None:
        self._file.write(json.dumps({kind: record}, separators=(",", ":")) + "\n")
        self._file.flush()


def tokens_of(output: SchedulerOutput, result: ExecutionResult) -> LoggedTokens:
    """The tokens of a result that count."""
    first = result.prefill.first_token if result.prefill is not None else None
    tokens: list[list[int]] = []
    if output.decode is not None and result.sampled is not None:
        rows = [each.row for each in output.decode.rows]
        tokens = result.sampled.tokens[: output.decode.num_steps, rows].tolist()
    return LoggedTokens(output.index, None if first is None else int(first.tokens[0, 0]), tokens)


def read_log(path: str | Path) -> Iterator[Header | SchedulerOutput | LoggedTokens]:
    """Reads a log: its header first, then outputs and results in their order.

    Raises:
        ValueError: the file is missing, is no such log, or is of another format; the message names
            the line.
    """
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield _read_line(line, is_first=number == 1)
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    except OSError as error:
        raise ValueError(f"the schedule log {path} cannot be read: {error}") from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells checkpoints apart: a hash of the configuration, the tensors' sizes, and the norms."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name in checkpoint.names():
        digest.update(f"{name} {checkpoint.stored(name)}".encode())
        if name.endswith("norm"):
            digest.update(checkpoint.tensor(name).tobytes())
    return digest.hexdigest()


def _read_line(line: str, *, is_first: bool) -> Header | SchedulerOutput | LoggedTokens:
    record = json.loads(line)
    if not isinstance(record, dict) or len(record) != 1:
        raise ValueError("a line must be an object with one key")
    ((kind, value),) = record.items()
    if is_first != (kind == "header"):
        raise ValueError(f"a log begins with its header, and has one; found {kind!r}")
    if kind == "header":
        return _read_header(value)
    if kind == "result":
        return LoggedTokens(**value)
    if kind == "output":
        return _decode(value)
    raise ValueError(f"unknown kind {kind!r}: the log is of a newer version")


def _read_header(record: dict[str, Any]) -> Header:
    if record.pop("format", None) != FORMAT:
        raise ValueError(
            f"the log's format is not {FORMAT}: replay it with the version that wrote it"
        )
    budgets = record["kv_config"].get("head_budgets")
    if budgets is not None:
        record["kv_config"]["head_budgets"] = tuple(map(tuple, budgets))
    return Header(
        **record
        | {
            "plan": Plan.from_json(json.dumps(record["plan"])),
            "engine_config": EngineConfig(**record["engine_config"]),
            "kv_config": KVConfig(**record["kv_config"]),
        }
    )


def _without_tokens(output: SchedulerOutput) -> SchedulerOutput:
    """The same work with zeros in place of all tokens."""
    prefill, insertion = output.prefill, output.insertion
    if prefill is not None and prefill.new_request is not None:
        zeros = [0] * len(prefill.new_request.prompt_token_ids)
        prefill = replace(prefill, new_request=replace(prefill.new_request, prompt_token_ids=zeros))
    if insertion is not None:
        insertion = replace(insertion, output_token_ids=[0] * len(insertion.output_token_ids))
    return replace(output, prefill=prefill, insertion=insertion)


def _encode(value: Any) -> Any:
    """Plain JSON; objects carry their class, and leave out fields that have their defaults."""
    if is_dataclass(value):
        record = {"class": type(value).__name__}
        for field in fields(value):
            part = getattr(value, field.name)
            if isinstance(part, np.ndarray) or field.default is MISSING or part != field.default:
                record[field.name] = _encode(part)
        return record
    if isinstance(value, np.ndarray):
        data = base64.b64encode(value.tobytes()).decode()
        return {"class": "array", "dtype": value.dtype.str, "shape": value.shape, "data": data}
    if isinstance(value, dict):
        return {"class": "dict", "items": [[key, _encode(part)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_encode(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _decode(value: Any) -> Any:
    """The inverse of `_encode`; sequences in fields of tuples become tuples."""
    if isinstance(value, list):
        return [_decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    record = dict(value)
    name = record.pop("class")
    if name == "array":
        data = np.frombuffer(base64.b64decode(record["data"]), np.dtype(record["dtype"]))
        return data.reshape(record["shape"])
    if name == "dict":
        return {key: _decode(part) for key, part in record["items"]}
    if name not in _CLASSES:
        raise ValueError(f"unknown class {name!r}")
    cls = _CLASSES[name]
    parts = {field: _decode(part) for field, part in record.items()}
    for field in fields(cls):
        if "tuple" in str(field.type) and isinstance(parts.get(field.name), list):
            parts[field.name] = tuple(
                tuple(part) if isinstance(part, list) else part for part in parts[field.name]
            )
    return cls(**parts)
