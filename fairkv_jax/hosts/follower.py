"""A follower: executes the leader's messages in their order, until it is told to stop."""

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import singledispatchmethod
from queue import SimpleQueue
from typing import Any, NoReturn

import jax

from fairkv_jax.command_line import ABORTED, exit_now
from fairkv_jax.engine.build import device_memory_bytes, prepare
from fairkv_jax.engine.execution import Execution
from fairkv_jax.engine.model_runner import ModelRunner
from fairkv_jax.hosts.comparison import Comparison
from fairkv_jax.hosts.handshake import connect_follower, disagreement
from fairkv_jax.hosts.jax_runtime import Coordinator
from fairkv_jax.hosts.messages import (
    Accepted,
    Compare,
    Execute,
    Failed,
    Heartbeat,
    Joined,
    Refused,
    Start,
    Stop,
    Stopped,
    WarmedUp,
    WarmUp,
)
from fairkv_jax.hosts.options import HostOptions
from fairkv_jax.hosts.transport import FollowerSockets
from fairkv_jax.hosts.watch import POLL_S, Heart, StepTimer
from fairkv_jax.plan import Plan

log = logging.getLogger(__name__)


def follow(
    options: HostOptions, step_timeout_s: float, engine_options: Mapping[str, Any]
) -> NoReturn:
    """Joins the group, loads this host's part of the model, and executes messages.

    The process exits with status 0 when the leader ends, and with 1 after any failure. Once the
    leader has been found, SIGTERM is ignored, and so is the first SIGINT: a supervisor or a
    terminal sends them to all hosts at once, and the leader finishes its requests first.

    Args:
        step_timeout_s: the longest time that a step may take.
        engine_options: see `build_engine`; by default the model is on all devices.
    """
    sockets = None
    try:
        # JAX waits for the hosts without returning to Python, so the handler could not run.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        log.info("host %d: waiting for %d hosts", options.host_index, options.num_hosts)
        sockets = connect_follower(Coordinator(options), options.host_index)
        _ignore_signals()
        watch = _Watch(sockets, options.host_timeout, step_timeout_s)
        _run(watch, options.host_index, engine_options)
    except BaseException as error:
        # Errors of options and of the files explain themselves.
        log.error("%s", error, exc_info=not isinstance(error, ValueError | OSError))
        if sockets is not None:
            sockets.send(Failed(str(error) or type(error).__name__))
            sockets.flush()
        exit_now(1)


def _run(watch: "_Watch", host_index: int, options: Mapping[str, Any]) -> NoReturn:
    """Loads the model as the leader says, and executes its messages."""
    ready = prepare(None, {"tensor_parallel_size": jax.device_count(), **options})
    watch.send(Joined(device_memory_bytes()))
    start = watch.messages.get()
    assert isinstance(start, Start)
    reason = disagreement(start, ready, host_index)
    if reason is not None:
        watch.refuse(reason)
    runner = ModelRunner(
        ready.checkpoint,
        Plan.from_json(start.plan),
        start.engine_config,
        start.kv_config,
        eos_token_ids=start.eos_token_ids,
        instruction=start.instruction,
        progress=False,
    )
    pages = runner.cache_spec.pages_per_device
    if pages != start.pages_per_device:
        watch.refuse(
            f"host {host_index} has {pages} pages per device, but the leader has "
            f"{start.pages_per_device}: use the same devices on all hosts"
        )
    watch.send(Accepted())
    log.info("host %d: ready, following the leader", host_index)
    executor = _Executor(runner, watch, host_index)
    while True:
        executor.take(watch.messages.get())


class _Executor:
    """Does what the messages say."""

    def __init__(self, runner: ModelRunner, watch: "_Watch", host_index: int):
        self._runner, self._watch, self._host_index = runner, watch, host_index
        self._in_flight: deque[Execution] = deque()
        self._comparison = Comparison()

    @singledispatchmethod
    def take(self, message: Any) -> None:
        raise ValueError(f"the leader sent a {type(message).__name__} while requests run")

    @take.register
    def _(self, message: WarmUp) -> None:
        self._runner.warm_up(
            message.prompt_lengths,
            message.num_rows,
            suffix_lengths=message.suffix_lengths,
            prompt_logprobs=message.prompt_logprobs,
            forks=message.forks,
        )
        self._watch.send(WarmedUp())

    @take.register
    def _(self, message: Execute) -> None:
        with self._watch.step():
            if message.output.insertion is not None:
                # The leader has read this prompt's prefill, and its memory is free there.
                while any(_ends_prefill(each) for each in self._in_flight):
                    self._read_oldest()
            self._in_flight.append(self._runner.execute(message.output))
            # The leader has read the results of the others.
            while len(self._in_flight) > self._runner.max_in_flight:
                self._read_oldest()

    @take.register
    def _(self, message: Compare) -> None:
        with self._watch.step():
            while self._in_flight and self._in_flight[0].output.index <= message.indices[-1]:
                self._read_oldest()
        if not self._comparison.agrees(message):
            raise ValueError(
                f"host {self._host_index} has sampled other tokens than the leader in one of the "
                f"outputs {message.indices[0]} to {message.indices[-1]}"
            )

    def _read_oldest(self) -> None:
        execution = self._in_flight.popleft()
        self._comparison.add(execution.output, execution.result())


def _ends_prefill(execution: Execution) -> bool:
    return execution.output.prefill is not None and execution.output.prefill.is_last


class _Watch:
    """Receives messages and sends heartbeats in a thread, and ends the process after silence."""

    def __init__(self, sockets: FollowerSockets, timeout_s: float, step_timeout_s: float):
        self.messages: SimpleQueue[Any] = SimpleQueue()
        """What is to be executed."""
        self._sockets, self._timeout_s = sockets, timeout_s
        self._steps = StepTimer(step_timeout_s)
        self._heard = time.monotonic()
        threading.Thread(target=self._run, name="hosts", daemon=True).start()

    def send(self, message: Any) -> None:
        self._sockets.send(message)

    def step(self) -> AbstractContextManager[None]:
        """The process ends if the body takes longer than a step may."""
        return self._steps.step()

    def refuse(self, reason: str) -> NoReturn:
        """Ends the process because it does not agree with the leader."""
        log.error("%s", reason)
        self.end(Refused(reason), 1)

    def end(self, message: Any, status: int) -> NoReturn:
        """Tells the leader why this process ends, and exits without JAX's barrier."""
        self._sockets.send(message)
        self._sockets.flush()
        exit_now(status)

    def _run(self) -> None:
        heart = Heart(self._timeout_s)
        try:
            while True:
                for message in self._sockets.receive(POLL_S):
                    self._heard = time.monotonic()
                    self._handle(message)
                now = time.monotonic()
                if heart.is_due(now):
                    self._sockets.send(Heartbeat())
                self._check_silence(now)
                self._steps.check(now)
        except Exception as error:
            self._fail(str(error))

    def _handle(self, message: Any) -> None:
        if isinstance(message, Stop):
            level = logging.ERROR if message.has_failed else logging.INFO
            log.log(level, "stopping: %s", message.reason)
            self.end(Stopped(), int(message.has_failed))
        if not isinstance(message, Heartbeat):
            self.messages.put(message)

    def _check_silence(self, now: float) -> None:
        if now - self._heard > self._timeout_s:
            self._fail(
                f"the leader has been silent for {self._timeout_s:g} seconds (--host-timeout)"
            )

    def _fail(self, reason: str) -> NoReturn:
        log.error("%s", reason)
        self.end(Failed(reason), 1)


def _ignore_signals() -> None:
    """Leaves it to the leader to end the group; a second SIGINT ends this process."""

    def interrupt(number: int, frame: Any) -> None:
        log.warning("the leader ends the group; a second SIGINT ends this host at once")
        signal.signal(signal.SIGINT, lambda number, frame: exit_now(ABORTED))

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, interrupt)
