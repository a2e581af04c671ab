"""Runs work whose duration a client decides: grammars and chat templates.

It has threads of its own, so that it delays neither the event loop nor the tokenization of other
requests, and it ends when its client disconnects.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from fastapi import Request

from fairkv_jax.serve.errors import ClientGone

_T = TypeVar("_T")
_NICENESS = 10
"""The threads leave the processors to the engine if both want them."""


class ClientWork:
    """Runs functions in a few threads; a client has only one of them at a time.

    A client that sends many expensive requests thus leaves the other threads to others.
    """

    def __init__(self, name: str, num_threads: int):
        self._threads = ThreadPoolExecutor(num_threads, name, initializer=_lower_priority)
        self._free = asyncio.Semaphore(num_threads)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(
        self, request: Request, client: str, function: Callable[..., _T], *args: Any, **options: Any
    ) -> _T:
        """Calls `function(*args, cancelled=event, **options)` in a thread and returns its result.

        The event is set when the client of the request disconnects.

        Raises:
            ClientGone: the client disconnected.
        """
        turn = self._turns.get(client)
        if turn is None:
            turn = self._turns[client] = asyncio.Lock()
        cancelled = threading.Event()
        call = partial(function, *args, cancelled=cancelled, **options)

        async def in_turn() -> _T:
            async with turn, self._free:
                return await asyncio.get_running_loop().run_in_executor(self._threads, call)

        try:
            return await unless_gone(request, in_turn())
        finally:
            cancelled.set()


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """Waits for work, which is cancelled if the client disconnects; the body has been read.

    Raises:
        ClientGone: the client disconnected.
    """
    done, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({done, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientGone("the client disconnected")
        return done.result()
    finally:
        done.cancel()
        watch.cancel()


async def _disconnected(request: Request) -> None:
    """Waits for the disconnect message, the only one that follows the body."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _lower_priority() -> None:
    """Lowers the priority of this thread alone, as Linux allows."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
