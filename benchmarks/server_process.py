"""A server in a process of its own, for benchmarks that need one."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def server_process(
    options: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Runs a server with these options of `serve`, and yields its address once it is ready.

    Raises:
        RuntimeError: the server did not start; the message has the end of its log.
    """
    given = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "fairkv_jax.serve", "--port=0", *given]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"ready: serving on (\S+)", line):
                    break
            else:
                raise RuntimeError("the server did not start:\n" + "".join(lines[-5:]))
            yield found.group(1)
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.close()
