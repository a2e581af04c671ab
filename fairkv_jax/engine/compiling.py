"""Compiles programs in threads, shows progress meanwhile, and counts whatever JAX compiles."""

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
    """Counts what this process compiles from now on, whoever asks for it.

    Programs that are read from the persistent cache count too: requests wait for them as well.
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
    """Calls functions that each compile a program, several at a time.

    Tracing holds Python's lock and compiling does not, so threads fill the processor's cores.

    Args:
        programs: what each program is for, as the progress bar names it, and its function.
        show: whether to show a progress bar, which says how many the persistent cache has had.
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
    """Tells of each function whether all that it compiled came from the persistent cache."""

    def __init__(self) -> None:
        self._seen = threading.local()  # JAX reports in the thread that compiles

    def __enter__(self) -> "_CacheHits":
        jax.monitoring.register_event_listener(self._count_hit)
        jax.monitoring.register_event_duration_secs_listener(self._count_compiled)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_listener(self._count_hit)
        jax.monitoring.unregister_event_duration_listener(self._count_compiled)

    def watch(self, make: Callable[[], object]) -> bool:
        """Calls a function; whether it compiled something, and nothing anew."""
        self._seen.hits = self._seen.compiled = 0
        make()
        return 0 < self._seen.hits == self._seen.compiled

    def _count_hit(self, event: str, **details: object) -> None:
        if event == _CACHE_HIT:
            self._seen.hits = getattr(self._seen, "hits", 0) + 1

    def _count_compiled(self, event: str, duration_secs: float, **details: object) -> None:
        if event == _COMPILED:
            self._seen.compiled = getattr(self._seen, "compiled", 0) + 1
