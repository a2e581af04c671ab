"""`python -m fairkv_jax.evaluate`: measures what KV-cache compression costs in quality."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import (
    as_flag,
    engine_flag,
    make_cpu_devices,
    normalise,
    string_list,
)
from fairkv_jax.config import ENGINE_OPTIONS, POLICIES, KVConfig
from fairkv_jax.options import options_of

_TASK_NAMES = (
    "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking",
    "common_words", "frequent_words",
)  # fmt: skip
_METHODS = flags.DEFINE_string(
    "methods",
    "ada_snapkv,streaming_llm",
    "Compression methods to compare, separated by commas: values of --kv-policy of the server. "
    "full is always run as the baseline.",
)
_RATIOS = flags.DEFINE_string(
    "ratios", "0.5,0.8", "Fractions of each prompt that are removed, in (0, 1)."
)
_TASKS = flags.DEFINE_string(
    "tasks",
    None,
    f"Synthetic tasks of RULER, separated by commas: {', '.join(_TASK_NAMES)}. Default: "
    "niah_single,niah_multikey, or none if --text or --questions is given.",
)
_QUESTION = flags.DEFINE_enum(
    "question",
    "both",
    ["in_view", "after", "both"],
    "in_view: a prompt is a document and a question, compressed together. after: the document is "
    "compressed before the question is known, and several questions share it.",
)
_LENGTHS = flags.DEFINE_string(
    "lengths", "1000", "Tokens of the prompts at most, and of the contexts of --text."
)
_SAMPLES = flags.DEFINE_integer(
    "num_samples", 20, "Documents per task and length, and passages of --text.", lower_bound=1
)
_PER_DOCUMENT = flags.DEFINE_integer(
    "questions_per_document",
    1,
    "Questions about each document of niah_multikey (at most 4) and variable_tracking.",
    lower_bound=1,
)
_HOPS = flags.DEFINE_integer(
    "hops", 4, "Assignments in a chain of variable_tracking after the first one.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed of the documents.", lower_bound=0)
_HAYSTACK = flags.DEFINE_string(
    "haystack",
    "python",
    "What the documents are filled with. python: sentences of the language reference that comes "
    "with Python. noise: a few short sentences, repeated. Otherwise, the path of a text.",
)
_TEXT = flags.DEFINE_string(
    "text",
    None,
    "Path of a text. Its passages are compressed, and the next 96 tokens are scored: their NLL, "
    "and their KL divergence from the full cache, in nats per token.",
)
_QUESTIONS = flags.DEFINE_string(
    "questions",
    None,
    "Path of a .jsonl file of your own questions, with the keys context, question and answer (a "
    "text, or a list of texts any of which is right).",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "evaluation",
    "Folder of the results. Running the same command again goes on with what is missing.",
)
_MAX_LOSS = flags.DEFINE_float(
    "max_loss", 5.0, "Loss of score, in points of 100, that the recommended budget may cost."
)
_BASE_URL = flags.DEFINE_string(
    "base_url",
    None,
    "Address of a running server, such as http://127.0.0.1:8000, which is measured instead of a "
    "model in this process. Start it with --kv-policy full and --enable-prefix-caching.",
)
_API_KEY = flags.DEFINE_string("api_key", None, "API key of the server.")
_NOT_OFFERED = (
    "kv_policy", "kv_budget", "kv_ratio", "kv_head_budgets", "enable_prefix_caching", "seed",
    "schedule_log", "schedule_log_prompts",
)  # fmt: skip
_ENGINE = {
    option.name: engine_flag(option.name)
    for option in ENGINE_OPTIONS
    if option.name not in _NOT_OFFERED
}
_ANSWERS_DEPEND_ON = {"model", "dtype", "quantization", "kv_cache_dtype"} | {
    o.name for o in options_of(KVConfig)
}


def main(argv: list[str]) -> int:
    """Runs the sweep, and writes its report."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options begin with --")
    try:
        _evaluate()
    except (ValueError, OSError) as error:
        print(f"fairkv_jax.evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "fairkv_jax.evaluate: interrupted; the same command goes on from here", file=sys.stderr
        )
        return 130
    return 0


def _evaluate() -> None:
    methods, ratios = _read_methods(), _read_numbers("ratios", _RATIOS.value, float)
    lengths = _read_numbers("lengths", _LENGTHS.value, int)
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"--ratios must lie between 0 and 1, got {ratio}")
    for length in lengths:
        if length < 1:
            raise ValueError(f"--lengths must be at least 1, got {length}")
    _check_methods(methods, ratios)
    tasks = _read_tasks()
    if _BASE_URL.value is not None and _TEXT.value is not None:
        raise ValueError(
            "--text needs the logits of whole vocabularies, which no server returns: leave out "
            "--base-url, or --text"
        )
    make_cpu_devices(_engine_options().get("tensor_parallel_size", 1))
    # These modules import JAX, which reads the environment variable set above.
    from fairkv_jax.evaluate.haystack import read_haystack, read_text
    from fairkv_jax.evaluate.report import write_report
    from fairkv_jax.evaluate.results import PROTOCOLS, Results
    from fairkv_jax.evaluate.sweep import Sweep, SweepPlan
    from fairkv_jax.evaluate.tasks import TaskOptions
    from fairkv_jax.evaluate.user_data import read_questions

    haystack = read_haystack(str(_HAYSTACK.value))
    options = TaskOptions(haystack, _SEED.value, _HOPS.value, _PER_DOCUMENT.value)
    path, text = _QUESTIONS.value, _TEXT.value
    plan = SweepPlan(
        tasks=tasks,
        methods=methods,
        ratios=ratios,
        protocols=PROTOCOLS if _QUESTION.value == "both" else (str(_QUESTION.value),),
        lengths=lengths,
        num_samples=int(_SAMPLES.value or 1),
        options=options,
        model=_describe_model(),
        questions=() if path is None else tuple(read_questions(path)),
        text=None if text is None else read_text(text, "--text"),
    )
    sweep = Sweep(plan, Results(str(_OUTPUT.value)), lambda method: _runner(method, ratios))
    sweep.run()
    write_report(sweep, float(_MAX_LOSS.value or 0) / 100, Path(str(_OUTPUT.value)))


def _read_methods() -> tuple[str, ...]:
    methods = string_list("methods", str(_METHODS.value))
    for method in methods:
        if method not in POLICIES:
            raise ValueError(
                f"unknown method {method!r} in --methods: use some of {', '.join(POLICIES)}"
            )
    return tuple(method for method in dict.fromkeys(methods) if method != "full")


def _check_methods(methods: tuple[str, ...], ratios: tuple[float, ...]) -> None:
    """Refuses methods that take no ratio, before anything is loaded."""
    for method in methods:
        try:
            KVConfig(policy=method, ratio=min(ratios))
        except ValueError as error:
            raise ValueError(f"--methods {method} cannot be swept by --ratios: {error}") from error


def _read_tasks() -> tuple[str, ...]:
    if _TASKS.value is None:
        has_own = _TEXT.value is not None or _QUESTIONS.value is not None
        return () if has_own else _TASK_NAMES[:2]
    tasks = string_list("tasks", str(_TASKS.value))
    for task in tasks:
        if task not in _TASK_NAMES:
            raise ValueError(f"unknown task {task!r} in --tasks: use some of {_TASK_NAMES}")
    return tuple(dict.fromkeys(tasks))


def _read_numbers(name: str, text: str | None, kind: type) -> tuple[Any, ...]:
    """Reads different numbers, in ascending order."""
    try:
        numbers = sorted({kind(part) for part in str(text).split(",") if part.strip()})
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{as_flag(name)} must be numbers separated by commas, got {text!r}")
    return tuple(numbers)


def _describe_model() -> dict[str, Any]:
    """Returns the options that the model's answers depend on, as far as they were given."""
    if _BASE_URL.value is not None:
        return {"base_url": _BASE_URL.value}
    given = _engine_options()
    return {name: given[name] for name in sorted(given) if name in _ANSWERS_DEPEND_ON}


def _engine_options() -> dict[str, Any]:
    return {name: flag.value for name, flag in _ENGINE.items() if flag.value is not None}


@contextmanager
def _runner(method: str, ratios: tuple[float, ...]) -> Iterator[Any]:
    """Opens what runs a method; its memory is free again afterwards."""
    if _BASE_URL.value is not None:
        from fairkv_jax.evaluate.server_runner import ServerRunner

        with ServerRunner(str(_BASE_URL.value), method, api_key=_API_KEY.value) as runner:
            yield runner
        return
    from fairkv_jax.evaluate.engine_runner import EngineRunner
    from fairkv_jax.evaluate.results import FULL

    options = _engine_options()
    ratio, allocator = None if method == FULL else min(ratios), options.get("kv_allocator")
    # The whole cache, which the others are compared to, takes no scores.
    if not KVConfig(policy=method, ratio=ratio, allocator=allocator).uses_head_scores:
        options.pop("kv_head_scores", None)
    runner = EngineRunner(method, ratios, **options)
    try:
        yield runner
    finally:
        del runner
        gc.collect()


if __name__ == "__main__":
    try:
        arguments = normalise(sys.argv, ENGINE_OPTIONS)
    except ValueError as error:
        sys.exit(f"fairkv_jax.evaluate: {error}")
    app.run(main, argv=arguments)
