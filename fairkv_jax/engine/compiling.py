"""Compiles programs in parallel with a progress bar, and counts JAX's compilations."""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax.monitoring
from tqdm import tqdm

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_MAX_THREADS = 8


class Compilations:
    """Counts all compilations in this process after its creation.

    Programs that are read from the persistent cache count too, because they also delay requests.
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


def compile_all(programs: Sequence[tuple[str, Callable[[], object]]], *, show: bool) -> None:
    """Calls functions that each compile a program, several at a time in threads.

    Compiling releases Python's global interpreter lock, so threads use all cores; tracing does not.

    Args:
        programs: pairs of the name that the progress bar shows and the function.
        show: whether to show a progress bar, with the number of programs found in the cache.
    """
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with (
        _CacheHits() as hits,
        tqdm(total=len(programs), desc="compiling", disable=not show) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool,
    ):
        futures = {pool.submit(hits.watch, make): name for name, make in programs}
        num_cached = 0
        try:
            for future in as_completed(futures):
                num_cached += future.result()
                bar.set_postfix_str(f"{futures[future]}; {num_cached} from the cache")
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _CacheHits:
    """Detects whether all programs that a function compiles come from the persistent cache."""

    def __init__(self) -> None:
        self._seen = threading.local()  # JAX calls the listeners in the thread that compiles.

    def __enter__(self) -> "_CacheHits":
        jax.monitoring.register_event_listener(self._count_hit)
        jax.monitoring.register_event_duration_secs_listener(self._count_compiled)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_listener(self._count_hit)
        jax.monitoring.unregister_event_duration_listener(self._count_compiled)

    def watch(self, make: Callable[[], object]) -> bool:
        """Calls a function and returns whether it compiled programs, all of them from the cache."""
        self._seen.hits = self._seen.compiled = 0
        make()
        return 0 < self._seen.hits == self._seen.compiled

    def _count_hit(self, event: str, **details: object) -> None:
        if event == _CACHE_HIT:
            self._seen.hits = getattr(self._seen, "hits", 0) + 1

    def _count_compiled(self, event: str, duration_secs: float, **details: object) -> None:
        if event == _COMPILED:
            self._seen.compiled = getattr(self._seen, "compiled", 0) + 1
