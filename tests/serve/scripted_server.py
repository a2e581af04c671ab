"""The server's process with a scripted engine: `... tests.serve.scripted_server FILE STEP [flags]`.

FILE is a tiny checkpoint; STEP is how many seconds a step takes, "loading" for an engine that never
loads, or "out of memory" for one that finds no memory. Flags are the server's.
"""

import logging
import sys
import time
from pathlib import Path

from fairkv_jax.serve.access import log_to_stdout
from fairkv_jax.serve.flags import parse
from fairkv_jax.serve.server import serve
from tests.serve.scripted import ScriptedEngine


def load() -> ScriptedEngine:
    if sys.argv[2] == "loading":
        time.sleep(600)
    if sys.argv[2] == "out of memory":
        raise MemoryError
    return ScriptedEngine(Path(sys.argv[1]), step_seconds=float(sys.argv[2]))


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    log_to_stdout("INFO")
    options = parse(["--port=0", "--shutdown-timeout=5", *sys.argv[3:]])
    sys.exit(serve(load, options.server))
