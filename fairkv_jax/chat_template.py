"""Renders conversations with the chat templates of checkpoints.

Templates come from untrusted checkpoints. They run in Jinja's sandbox, which keeps them from the
interpreter's objects, and in a bounded worker, because the sandbox limits neither time nor memory.
"""

import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from fairkv_jax.bounded_worker import LimitExceeded, WorkerLimits, WorkerPool

LIMITS = WorkerLimits(timeout_s=5.0, memory_bytes=256 << 20, output_bytes=16 << 20)
"""Ordinary templates take less than a millisecond for a short conversation."""
_EXCEEDED = {
    "time": f"takes more than {LIMITS.timeout_s:g} seconds for these messages",
    "memory": f"takes more than {LIMITS.memory_bytes >> 20} MiB for these messages",
    "output": f"writes more than {LIMITS.output_bytes >> 20} MiB for these messages",
}
NUM_WORKERS = 2
"""Conversations that are rendered at a time."""


class ChatTemplate:
    """A template that any thread may render."""

    def __init__(self, source: str):
        self._pool = WorkerPool(
            f"{__name__}:make_renderer", source, LIMITS, num_workers=NUM_WORKERS
        )

    def warm_up(self) -> None:
        """Starts the worker, so that the first conversation does not have to wait for it."""
        self._pool.warm_up()

    def render(self, variables: Mapping[str, Any], cancelled: threading.Event | None = None) -> str:
        """Renders the template with values that JSON can represent.

        Raises:
            ValueError: the template does not compile, rejects the values, or meets a limit.
            CallCancelled: `cancelled` was set before the end.
        """
        try:
            return self._pool.call(variables, cancelled)
        except LimitExceeded as error:
            raise ValueError(f"the model's chat template {_EXCEEDED[error.limit]}") from error


def make_renderer(source: str) -> Callable[[dict[str, Any]], str]:
    """Returns the function that renders the template; it runs in the worker."""
    template: jinja2.Template | None = None

    def render(variables: dict[str, Any]) -> str:
        nonlocal template
        template = template or _compile(source)
        try:
            return template.render(variables)
        except MemoryError:
            raise
        except Exception as error:  # Templates come with checkpoints and may raise anything.
            raise ValueError(f"the model's chat template rejects the messages: {error}") from error

    return render


def _compile(source: str) -> jinja2.Template:
    """Compiles a chat template with the extensions that Hugging Face's templates use."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Jinja's own filter escapes <, > and & for HTML, which is not what models were trained on.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the model's chat template does not compile: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
