"""What JAX compiles: counted, and shown while one waits for it."""

import weakref
from collections.abc import Callable
from types import TracebackType

import jax.monitoring
from jax.stages import Compiled
from tqdm import tqdm

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class Compilations:
    """Counts what this process compiles from now on, whoever asks for it.

    Programs that are read from the persistent cache count too: they are waited for as well.
    """

    def __init__(self) -> None:
        self.count = 0
        me = weakref.ref(self)

        def listen(event: str, duration_secs: float, **details: object) -> None:
            counter = me()
            if counter is not None and event == _COMPILED:
                counter.count += 1

        jax.monitoring.register_event_duration_secs_listener(listen)
        forget = jax.monitoring.unregister_event_duration_listener
        weakref.finalize(self, forget, listen).atexit = False


class CompilingBar:
    """A progress bar over programs: how many of them, which one, how many the cache has had."""

    def __init__(self, total: int, *, show: bool):
        self._bar = tqdm(total=total, desc="compiling", disable=not show)
        self._compilations = Compilations()
        self._hits = 0
        self._cached = 0

    def __enter__(self) -> "CompilingBar":
        jax.monitoring.register_event_listener(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_listener(self._listen)
        self._bar.close()

    def __call__(self, shape: str, make: Callable[..., Compiled], *args: object) -> Compiled:
        """Makes a program, or finds it made; `shape` says which."""
        compiled, hits = self._compilations.count, self._hits
        self._say(shape)
        program = make(*args)
        # What prepares a program compiles too: it is the cache's where all of that was.
        hits = self._hits - hits
        self._cached += 0 < hits == self._compilations.count - compiled
        self._bar.update()
        self._say(shape)
        return program

    def _say(self, shape: str) -> None:
        self._bar.set_postfix_str(f"{shape}; {self._cached} from the cache")

    def _listen(self, event: str, **details: object) -> None:
        if event == _CACHE_HIT:
            self._hits += 1
