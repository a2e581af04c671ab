"""Measures the time to the first token of questions about a document, cached and not.

    python -m benchmarks.cached_document

An engine caches a document once and answers questions about it, each of which reads only its own
tokens. Another one, with the same options but without prefixes, reads the document with a question.
A token is generated each time. Reading a long document takes about a minute on two CPU cores.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from absl import app, flags

from fairkv_jax.command_line import engine_flag, make_cpu_devices, with_underscores

_MODEL = engine_flag("model")
_POLICY = engine_flag("kv_policy", default="duo_attention")
_RATIO = engine_flag("kv_ratio", default=0.8)
_DEVICES = flags.DEFINE_integer("devices", 2, "Number of devices that share the model.")
_DOCUMENT = flags.DEFINE_integer("document", 8000, "Tokens of the document.", lower_bound=1)
_QUESTION = flags.DEFINE_integer("question", 60, "Tokens of each question.", lower_bound=1)
_QUESTIONS = flags.DEFINE_integer("questions", 9, "Questions about the cached document.")
_OUTPUT = flags.DEFINE_string("output", None, "Path to which the printed JSON is also written.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    make_cpu_devices(_DEVICES.value)
    load = os.getloadavg()
    names = ("model", "devices", "kv_policy", "kv_ratio", "document", "question", "questions")
    cached, whole = engine(enable_prefix_caching=True), engine()
    tokens = text_tokens(cached, _DOCUMENT.value + (_QUESTIONS.value + 1) * _QUESTION.value)
    document, rest = tokens[: _DOCUMENT.value], tokens[_DOCUMENT.value :]
    size = _QUESTION.value
    questions = [rest[i : i + size] for i in range(0, len(rest), size)]

    start = time.perf_counter()
    prefix = cached.cache_prefix(document)
    caching = time.perf_counter() - start
    _time_answer(cached, questions[0], prefix.id)  # what has not been compiled yet is now
    times = [_time_answer(cached, question, prefix.id) for question in questions[1:]]
    _time_answer(whole, questions[0])
    without = _time_answer(whole, [*document, *questions[1]])
    results = {
        "options": {name: flags.FLAGS[name].value for name in names},
        "load_average_before_and_after": [load, os.getloadavg()],
        "kept_per_head": float(prefix.kept_tokens.mean()),
        "seconds": {"caching": caching, "cached": times, "without": without},
        "without_over_cached": without / median(times),
    }
    print(json.dumps(results, indent=1))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def engine(**options: Any) -> Any:
    """Returns an `LLM` whose programs are compiled."""
    from fairkv_jax import LLM

    llm = LLM(
        _MODEL.value,
        tensor_parallel_size=_DEVICES.value,
        dtype="float32",
        kv_policy=_POLICY.value,
        kv_ratio=_RATIO.value,
        max_model_len=_DOCUMENT.value + _QUESTION.value + 64,
        max_num_seqs=1,
        progress=False,
        **options,
    )
    lengths = [_DOCUMENT.value, _QUESTION.value, _DOCUMENT.value + _QUESTION.value]
    llm.engine.warm_up(lengths, 1, prompt_logprobs=False)
    return llm


def text_tokens(llm: Any, count: int) -> list[int]:
    """Returns the first tokens of Python's documentation."""
    from fairkv_jax.evaluate.haystack import read_haystack

    tokens = llm.get_tokenizer().encode(" ".join(read_haystack("python").sentences))
    if len(tokens) < count:
        raise app.UsageError(f"the text has {len(tokens)} tokens, {count} are asked for")
    return tokens[:count]


def _time_answer(llm: Any, prompt: list[int], prefix_id: str | None = None) -> float:
    from fairkv_jax import SamplingParams

    start = time.perf_counter()
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), prefix_id=prefix_id)
    return time.perf_counter() - start


if __name__ == "__main__":
    app.run(main, [with_underscores(argument) for argument in sys.argv])
