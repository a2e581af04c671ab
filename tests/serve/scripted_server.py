"""The server's process with a scripted engine: `python -m tests.serve.scripted_server FILE STEP`.

FILE is a tiny checkpoint; STEP is how many seconds a step takes, or "loading" for an engine that
never loads.
"""

import logging
import sys
import time
from pathlib import Path

from fairkv_jax.serve.options import ServerOptions
from fairkv_jax.serve.server import serve
from tests.serve.scripted import ScriptedEngine


def load() -> ScriptedEngine:
    if sys.argv[2] == "loading":
        time.sleep(600)
    return ScriptedEngine(Path(sys.argv[1]), step_seconds=float(sys.argv[2]))


if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    sys.exit(serve(load, ServerOptions(port=0, shutdown_timeout=5)))
