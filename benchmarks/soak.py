"""Sends many random requests to a running server and checks that no resources leak.

    python -m benchmarks.soak --num-requests 2000 --cancelled 0.2

Lengths, parameters and the number of concurrent requests are random, and some requests are
cancelled. The exit status is 1 if the server responded with a status other than 200, compiled a
program, or has KV pages in use after all requests have ended.
"""

import asyncio
import json
import logging
import sys
from pathlib import Path

from absl import app, flags

from benchmarks.mixed_requests import is_sound, soak
from fairkv_jax.command_line import with_underscores

_URL = flags.DEFINE_string("base_url", "http://127.0.0.1:8000", "Address of the server.")
_KEY = flags.DEFINE_string("api_key", None, "API key of the server.")
_REQUESTS = flags.DEFINE_integer("num_requests", 2000, "Number of requests.", lower_bound=2)
_CANCELLED = flags.DEFINE_float("cancelled", 0.2, "Fraction of requests that are cancelled.", 0, 1)
_AT_ONCE = flags.DEFINE_integer(
    "max_concurrency", 16, "Maximum concurrent requests.", lower_bound=1
)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 16, "Maximum generated tokens.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.")
_RESULT = flags.DEFINE_string("output", None, "Path to which the printed JSON is also written.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.getLogger("httpx").setLevel("WARNING")
    names = ("num_requests", "cancelled", "max_concurrency", "output_len", "seed")
    options = {name: flags.FLAGS[name].value for name in names}
    result = asyncio.run(soak(_URL.value.rstrip("/"), _KEY.value, options))
    text = json.dumps({"options": options, **result}, indent=2)
    print(text)
    if _RESULT.value:
        Path(_RESULT.value).write_text(text + "\n", encoding="utf-8")
    return 0 if is_sound(result) else 1


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
