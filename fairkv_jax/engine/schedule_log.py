"""A log of everything that an engine executes, which can be replayed: one JSON object per line.

    {"header": {...}}                the engine: versions, model, plan, configurations
    {"output": {"index": 0, ...}}    a `SchedulerOutput`, when it is given to the devices
    {"result": {"index": 0, ...}}    the tokens that it produced, when they are read

Replaying the outputs gives the same tokens, so that a bug report can carry such a log. Prompts and
tokens are in it only if they are asked for. Without them, the log also leaves out everything that
repeats or reveals a client's texts: stop strings, grammars and their bitmasks. Other sampling
options are always in it.
"""

import base64
import hashlib
import json
import logging
import weakref
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from fairkv_jax.checkpoint import Checkpoint
from fairkv_jax.config import EngineConfig, KVConfig
from fairkv_jax.engine.page_tables import PageCopies, PageReplication, PageTableUpdate
from fairkv_jax.engine.scheduler_output import (
    Decode,
    DecodeRow,
    ExecutionResult,
    Fork,
    Insertion,
    NewRequest,
    PrefillChunks,
    RowCompression,
    RowPrefix,
    SchedulerOutput,
)
from fairkv_jax.plan import HeadScores, Plan
from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams

FORMAT = 1
"""The version of the file format."""
LOGGED_CLASSES = (
    Decode,
    DecodeRow,
    Fork,
    Insertion,
    NewRequest,
    PageCopies,
    PageReplication,
    PageTableUpdate,
    PrefillChunks,
    RowCompression,
    RowPrefix,
    SamplingParams,
    SchedulerOutput,
    StructuredOutputsParams,
)
"""The dataclasses that a `SchedulerOutput` consists of."""
_CLASSES = {cls.__name__: cls for cls in LOGGED_CLASSES}
_HASHED_WEIGHTS = ("q", "k", "v", "gate")
"""Weights of each layer whose first rows are hashed: few bytes, which most fine-tuning changes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """Describes an engine, so that a replay can make the same one."""

    model: str
    """The path or name that opens the checkpoint."""
    fingerprint: str
    """See `fingerprint`."""
    plan: Plan
    engine_config: EngineConfig
    kv_config: KVConfig
    has_prompts: bool
    """Whether the log holds prompts and tokens."""
    platform: str
    """JAX's name of the devices: "cpu" or "gpu"."""
    version: str
    """The version of this package."""

    @classmethod
    def of(
        cls,
        model: str | Path,
        checkpoint: Checkpoint,
        plan: Plan,
        engine_config: EngineConfig,
        kv_config: KVConfig,
        *,
        has_prompts: bool,
        platform: str,
    ) -> "Header":
        """Describes an engine whose checkpoint is opened by `model`; a path becomes absolute."""
        return cls(
            str(Path(model).resolve() if Path(model).exists() else model),
            fingerprint(checkpoint),
            plan,
            engine_config,
            kv_config,
            has_prompts,
            platform,
            version("fairkv-jax"),
        )


@dataclass(frozen=True)
class LoggedTokens:
    """The tokens that one output produced."""

    index: int
    """The index of the output."""
    first_token: int | None
    """The token that followed the prompt, where one was sampled."""
    tokens: list[list[int]]
    """For each decode step, the tokens of the decoded rows in the order of `Decode.rows`."""
    other_first_tokens: list[int] = field(default_factory=list)
    """Those of `PrefillChunks.also_samples` and `PrefillChunks.packed`."""


LogEntry = Header | SchedulerOutput | LoggedTokens


class ScheduleLog:
    """Writes a log while the engine runs; every line is flushed.

    If a line cannot be written later on, for example because the disk is full, an error is logged
    and the log ends; the engine continues. The file is closed when the object is collected, unless
    `close` has been called before.

    Raises:
        ValueError: the file cannot be opened.
    """

    def __init__(self, path: str | Path, header: Header):
        self._path, self._has_prompts = path, header.has_prompts
        try:
            self._file: IO[str] = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"the schedule log {path} cannot be written ({reason}): give the path of a file in "
                "a folder that exists and is writable"
            ) from error
        self._close = weakref.finalize(self, _close, self._file)
        record = asdict(header) | {"format": FORMAT, "plan": json.loads(header.plan.to_json())}
        self._write("header", record)

    def write_output(self, output: SchedulerOutput) -> None:
        """Writes an output that the devices are about to execute."""
        if not self._has_prompts:
            output = _without_tokens(output)
        self._write("output", _encode(output))

    def write_result(self, output: SchedulerOutput, result: ExecutionResult) -> None:
        """Writes the tokens that an output produced, if the log holds tokens."""
        if self._has_prompts:
            self._write("result", asdict(tokens_of(output, result)))

    def close(self) -> None:
        """Closes the file; nothing is written afterwards."""
        self._close()

    def _write(self, kind: str, record: Any) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps({kind: record}, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            logger.error(
                "the schedule log %s ends here, it cannot be written: %s", self._path, error
            )
            self.close()


def tokens_of(output: SchedulerOutput, result: ExecutionResult) -> LoggedTokens:
    """Returns the tokens of a result that belong to requests."""
    first = result.prefill.first_token if result.prefill is not None else None
    tokens: list[list[int]] = []
    if output.decode is not None and result.sampled is not None:
        rows = [each.row for each in output.decode.rows]
        tokens = result.sampled.tokens[: output.decode.num_steps, rows].tolist()
    firsts = [] if first is None else first.tokens[0].tolist()
    return LoggedTokens(output.index, firsts[0] if firsts else None, tokens, firsts[1:])


def read_log(path: str | Path) -> Iterator[LogEntry]:
    """Reads a log: its header first, then the other entries in their order.

    A last line that is incomplete, because the writer was killed, is left out with a warning.

    Raises:
        ValueError: the file is missing, is not a schedule log, or has another format; the message
            names the line.
    """
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number > 1 and not line.endswith(b"\n"):
                    logger.warning("%s, line %d: incomplete, it is left out", path, number)
                    return
                yield _read_line(line, f"{path}, line {number}", is_first=number == 1)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"the schedule log {path} cannot be read: {reason}") from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns a hash that tells checkpoints apart, without reading all of their weights.

    It covers the configuration, how every tensor is stored, all norms, and the first rows of some
    matrices in every layer.
    """
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for name in checkpoint.names():
        digest.update(f"{name} {tuple(checkpoint.stored(name))}".encode())
        if name.endswith("norm"):
            digest.update(checkpoint.tensor(name).tobytes())
        elif name.rpartition(".")[2] in _HASHED_WEIGHTS:
            digest.update(np.ascontiguousarray(checkpoint.lazy(name).read(0, 1)).tobytes())
    return digest.hexdigest()


def _close(file: IO[str]) -> None:
    """Closes a file whose last line may be impossible to write."""
    try:
        file.close()
    except OSError as error:
        logger.error("the schedule log cannot be closed: %s", error)


def _read_line(line: bytes, place: str, *, is_first: bool) -> LogEntry:
    """Decodes a line; `place` names it in errors."""
    try:
        ((kind, value),) = json.loads(line).items()
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{place} is not an object with one key in JSON: this is not a schedule log, or it is "
            "damaged"
        ) from error
    if is_first != (kind == "header"):
        raise ValueError(f"{place}: a log has one header, in its first line; found {kind!r}")
    if kind not in _READERS:
        raise ValueError(f"{place}: unknown entry {kind!r}, it must be {', '.join(_READERS)}")
    if kind == "header" and isinstance(value, dict) and value.get("format") != FORMAT:
        raise ValueError(
            f"{place}: the log has format {value.get('format')!r}, this version reads {FORMAT}: "
            f"replay it with fairkv-jax {value.get('version')}, which wrote it"
        )
    try:
        return _READERS[kind](value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: the {kind} is damaged: {error!r}") from error


def _read_header(record: dict[str, Any]) -> Header:
    fields = {name: value for name, value in record.items() if name != "format"}
    kv_config = dict(fields["kv_config"])
    if kv_config.get("head_budgets") is not None:
        kv_config["head_budgets"] = tuple(map(tuple, kv_config["head_budgets"]))
    if kv_config.get("head_scores") is not None:
        kv_config["head_scores"] = HeadScores(**kv_config["head_scores"])
    fields["plan"] = Plan.from_json(json.dumps(fields["plan"]))
    fields["engine_config"] = EngineConfig(**fields["engine_config"])
    fields["kv_config"] = KVConfig(**kv_config)
    return Header(**fields)


def _read_output(record: Any) -> SchedulerOutput:
    output = _decode(record)
    if not isinstance(output, SchedulerOutput):
        raise ValueError(f"it is a {type(output).__name__}")
    return output


_READERS = {
    "header": _read_header,
    "output": _read_output,
    "result": lambda record: LoggedTokens(**record),
}


def _without_tokens(output: SchedulerOutput) -> SchedulerOutput:
    """Returns the same work with zeros in place of tokens, and without texts and grammars.

    Bitmasks follow an output: where a grammar allows a single token, they reveal it.
    """
    prefill, insertion, decode = output.prefill, output.insertion, output.decode
    more = tuple(
        replace(each, output_token_ids=[0] * len(each.output_token_ids))
        for each in output.more_insertions
    )
    if prefill is not None:
        new = prefill.new_request
        if new is not None:
            new = _without_texts(new)
        prefix = prefill.cached_prefix
        if prefix is not None:
            prefix = replace(prefix, token_ids=[0] * len(prefix.token_ids))
        others = tuple(_without_texts(each) for each in prefill.also_samples)
        prefill = replace(
            prefill,
            new_request=new,
            cached_prefix=prefix,
            grammar_bitmask=None,
            also_samples=others,
            packed=tuple(_without_texts(each) for each in prefill.packed),
        )
    if insertion is not None:
        fork = insertion.fork
        if fork is not None:
            fork = replace(fork, new_request=_without_texts(fork.new_request))
        zeros = [0] * len(insertion.output_token_ids)
        insertion = replace(insertion, output_token_ids=zeros, fork=fork)
    if decode is not None:
        decode = replace(decode, grammar_bitmasks={})
    return replace(
        output, prefill=prefill, insertion=insertion, more_insertions=more, decode=decode
    )


def _without_texts(request: NewRequest) -> NewRequest:
    params = replace(request.sampling_params, stop=None, structured_outputs=None)
    zeros = [0] * len(request.prompt_token_ids)
    return replace(request, prompt_token_ids=zeros, sampling_params=params)


def _encode(value: Any) -> Any:
    """Returns plain JSON. Objects carry their class, and omit fields that have their defaults."""
    if is_dataclass(value):
        record = {"class": type(value).__name__}
        for each in fields(value):
            part = getattr(value, each.name)
            if isinstance(part, np.ndarray) or each.default is MISSING or part != each.default:
                record[each.name] = _encode(part)
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
    """Inverts `_encode`. Lists become tuples, also inside of them, in fields that take tuples."""
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
    parts = {name: _decode(part) for name, part in record.items()}
    for each in fields(cls):
        if "tuple" in str(each.type) and isinstance(parts.get(each.name), list):
            parts[each.name] = tuple(
                tuple(part) if isinstance(part, list) else part for part in parts[each.name]
            )
    return cls(**parts)
