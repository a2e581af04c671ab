"""Two replicas with a tiny model behind every router of launch/router/, at the same time.

One story is told once, as starting a replica takes longest: load, a crash, the return of the
replica, and a drain. The tests look at what the clients of each router saw of it.
"""

import asyncio
import itertools
import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.launch.routers import ROUTERS, NotInstalled, Router, free_port
from tests.oracle.tiny import write_tiny_checkpoint
from tests.serve.live import PATIENCE_S, Process, eventually

pytestmark = pytest.mark.long

START_S = 400.0
FLAGS = (
    "--tensor-parallel-size=1",
    "--max-model-len=1024",
    "--max-num-seqs=16",
    "--kv-budget=64",
    "--shutdown-timeout=120",
)
PROMPTS = tuple(f"{word} and the wall" for word in ("inn", "hall", "barn", "mill", "well"))
SHORT = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
LONG = {"max_tokens": 600, "temperature": 0, "ignore_eos": True, "stream": True}
ENOUGH = 12
"""Requests of each router that a part of the story takes."""
STREAMS = 4
"""Long streams that each router gets at a time, so that both replicas have some."""


class Replica:
    """A server that can be started again at the same address.

    The two have different weights, so that their texts say which one has answered.
    """

    def __init__(self, checkpoint: Path):
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        self._arguments = [*FLAGS, f"--model={checkpoint}", f"--port={port}"]
        self.process = self.start()

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> Process:
        self.process = Process("fairkv_jax.serve", self._arguments)
        return self.process

    def aborted(self) -> float:
        """How many requests ended because their clients had left."""
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        name = 'vllm:request_success_total{engine="0",finished_reason="abort"'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def texts(self) -> dict[str, str]:
        """What it answers to each prompt."""
        found = {}
        for prompt in PROMPTS:
            body = {"model": "tiny", "prompt": prompt, **SHORT}
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)
            found[prompt] = answer.json()["choices"][0]["text"]
        return found


@dataclass
class Answer:
    """What became of one request."""

    prompt: str
    streams: bool
    began_in: str
    """The part of the story in which it was sent."""
    ended_in: str | None = None
    outcome: str = "sent"
    """Then "served", "broken" if a response ended early, "unanswered" if the connection was closed
    before it began, or what went wrong."""
    text: str = ""
    recognised_by: int = 0
    """How many characters tell the replicas apart."""
    has_begun: threading.Event = field(default_factory=threading.Event)
    """Set when a stream has more characters than that, or when the answer has ended."""
    leave: Callable[[], object] = lambda: None
    """Hangs up on a long stream."""

    @property
    def has_ended(self) -> bool:
        return self.outcome != "sent"


async def ask(client: httpx.AsyncClient, answer: Answer, options: dict[str, object]) -> None:
    """Sends a request once, and records what becomes of it."""
    body = {"model": "tiny", "prompt": answer.prompt, **options, "stream": answer.streams}
    has_response = is_whole = False
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.outcome = f"{response.status_code}: {(await response.aread())!r}"
                return
            has_response = True
            if not answer.streams:
                answer.text = json.loads(await response.aread())["choices"][0]["text"]
                answer.outcome = "served"
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_whole = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    answer.text += event["choices"][0]["text"]
                    if len(answer.text) > answer.recognised_by:
                        answer.has_begun.set()
        answer.outcome = "served" if is_whole else "broken"
    except httpx.RemoteProtocolError:
        answer.outcome = "broken" if has_response else "unanswered"
    except (httpx.TransportError, LookupError) as error:  # an event with an error has no choices
        answer.outcome = "broken" if has_response else repr(error)
    finally:
        answer.has_begun.set()


class Clients(threading.Thread):
    """The clients of one router: one asks for whole answers all the time, and one for streams.

    Others ask for long streams beside them.
    """

    def __init__(self, router: Router):
        super().__init__(daemon=True)
        self.router = router
        self.answers: list[Answer] = []
        self.part = "start"
        self._ending = False
        self._loop = asyncio.new_event_loop()
        self._pool = httpx.AsyncClient(base_url=router.url, timeout=PATIENCE_S)

    def run(self) -> None:
        self._loop.run_until_complete(self._all())
        self._loop.close()

    async def _all(self) -> None:
        async with self._pool:
            await asyncio.gather(self._client(streams=False), self._client(streams=True))

    async def _client(self, *, streams: bool) -> None:
        count = 0
        while not self._ending:
            count += 1
            answer = Answer(PROMPTS[count % len(PROMPTS)], streams, self.part)
            self.answers.append(answer)
            await ask(self._pool, answer, SHORT)
            answer.ended_in = self.part
            # A replica that loads needs the processors.
            await asyncio.sleep(1.0 if self.part == "return" else 0.1)

    def end(self) -> None:
        self._ending = True
        self.join(PATIENCE_S)

    def open_stream(self, recognised_by: int) -> Answer:
        """Sends a request for a long stream."""
        answer = Answer(PROMPTS[0], True, self.part, recognised_by=recognised_by)
        asking = asyncio.run_coroutine_threadsafe(ask(self._pool, answer, LONG), self._loop)
        answer.leave = asking.cancel
        return answer

    def of(self, *parts: str) -> list[Answer]:
        return [answer for answer in self.answers if answer.began_in in parts]


@dataclass
class Story:
    """What the clients of each router saw."""

    clients: dict[str, Clients]
    missing: dict[str, str]
    """Why a router did not run."""
    crash: dict[str, list[Answer]] = field(default_factory=dict)
    """Long streams that ran when replica a was killed."""
    drain: dict[str, list[Answer]] = field(default_factory=dict)
    """Long streams that ran when replica b was told to end."""
    drained_with: int | None = None
    """The exit status of replica b."""
    abandoned: dict[str, float] = field(default_factory=dict)
    """Requests that replica a aborted after one client of each router had left."""
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """By replica, the text that follows each prompt."""

    def replica(self, answer: Answer) -> str | None:
        """Which replica has answered, by the text."""
        for name, texts in self.texts.items():
            if answer.text and answer.text.startswith(texts[answer.prompt]):
                return name
        return None

    def replicas(self, answers: Sequence[Answer]) -> set[str | None]:
        return {self.replica(answer) for answer in answers}

    def open_streams(self, clients: Iterable[Clients], count: int) -> dict[str, list[Answer]]:
        """Opens long streams through each of these routers, and waits until all have begun."""
        length = max(len(texts[PROMPTS[0]]) for texts in self.texts.values())
        streams = {
            each.router.name: [each.open_stream(length) for _ in range(count)] for each in clients
        }
        for answer in itertools.chain(*streams.values()):
            assert answer.has_begun.wait(START_S)
        return streams

    def turn_to(self, part: str) -> None:
        for clients in self.clients.values():
            clients.part = part

    def wait_for(self, part: str, replicas: set[str]) -> None:
        """Until every router has served enough in a part, by these replicas."""

        def is_enough(clients: Clients) -> bool:
            served = [answer for answer in clients.of(part) if answer.has_ended]
            return len(served) >= ENOUGH and replicas <= self.replicas(served)

        try:
            eventually(lambda: all(map(is_enough, self.clients.values())), START_S)
        except AssertionError as error:
            raise AssertionError(f"{part}: {self.summary(part)}") from error

    def summary(self, part: str) -> dict[str, Counter]:
        """What became of the short requests of a part, by router."""
        return {
            name: Counter((self.replica(answer), answer.outcome) for answer in clients.of(part))
            for name, clients in self.clients.items()
        }


@pytest.fixture(scope="module")
def story(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with ExitStack() as running:
        folder = tmp_path_factory.mktemp("routers")
        other = write_tiny_checkpoint(folder / "tiny.gguf", seed=1)
        replicas = [Replica(checkpoint) for checkpoint in (tiny_checkpoint, other)]
        for replica in replicas:
            running.callback(lambda replica=replica: replica.process.__exit__())
        story = Story({}, {})
        addresses = [replica.address for replica in replicas]
        for name, router in ROUTERS.items():
            try:
                story.clients[name] = Clients(
                    running.enter_context(router(free_port(), addresses, folder))
                )
            except NotInstalled as missing:
                story.missing[name] = str(missing)
        tell(story, *replicas)
        yield story


def tell(story: Story, a: Replica, b: Replica) -> None:
    for replica in (a, b):
        replica.process.wait_ready(START_S)
    story.texts = {"a": a.texts(), "b": b.texts()}
    for clients in story.clients.values():
        eventually(clients.router.is_up)
        clients.part = "both"
        clients.start()
    try:
        story.wait_for("both", {"a", "b"})

        story.crash = story.open_streams(story.clients.values(), STREAMS)
        story.turn_to("crash")
        a.process.__exit__()  # by SIGKILL
        story.wait_for("crash", {"b"})
        wait_for_all(story.crash)

        story.turn_to("return")
        a.start()
        a.process.wait_ready(START_S)
        story.turn_to("back")
        story.wait_for("back", {"a", "b"})

        story.drain = story.open_streams(story.clients.values(), STREAMS)
        story.turn_to("drain")
        b.process.send(signal.SIGTERM)
        story.drained_with = b.process.status(START_S)
        story.turn_to("drained")
        story.wait_for("drained", {"a"})
        wait_for_all(story.drain)

        for name, clients in story.clients.items():
            before = a.aborted()
            (stream,) = story.open_streams([clients], 1)[name]
            stream.leave()
            with suppress(AssertionError):
                eventually(lambda before=before: a.aborted() > before)
            story.abandoned[name] = a.aborted() - before
    finally:
        for clients in story.clients.values():
            clients.end()


def wait_for_all(streams: dict[str, list[Answer]]) -> None:
    everything = list(itertools.chain(*streams.values()))
    eventually(lambda: all(answer.has_ended for answer in everything), START_S)


@pytest.fixture(params=ROUTERS)
def router(request: pytest.FixtureRequest, story: Story) -> str:
    if request.param in story.missing:
        pytest.skip(story.missing[request.param])
    return request.param


def test_load_goes_to_both(story: Story, router: str):
    for part in ("both", "back"):
        answers = [each for each in story.clients[router].of(part) if each.ended_in == part]
        assert {answer.outcome for answer in answers} == {"served"}
        assert story.replicas(answers) == {"a", "b"}


def test_a_crash_breaks_only_streams_that_have_begun(story: Story, router: str):
    """HAProxy repeats a request whose connection the replica closes, not one that it resets."""
    outcomes = {(story.replica(answer), answer.outcome) for answer in story.crash[router]}
    assert outcomes == {("a", "broken"), ("b", "served")}
    answers = story.clients[router].of("both", "crash", "return")
    bad = [answer for answer in answers if answer.outcome != "served"]
    assert len(bad) <= 2  # each of the two clients waits for one answer at a time
    for answer in bad:
        assert answer.began_in in ("both", "crash")
        if not (router == "haproxy" and answer.outcome == "unanswered"):
            assert answer.streams
            assert answer.outcome == "broken"


def test_a_drain_loses_nothing(story: Story, router: str):
    assert story.drained_with == 0
    answers = [*story.drain[router], *story.clients[router].of("back", "drain", "drained")]
    assert {answer.outcome for answer in answers} == {"served"}
    assert story.replicas(story.clients[router].of("drained")) == {"a"}


def test_a_client_that_leaves_frees_its_row(story: Story, router: str):
    assert story.abandoned[router] == 1
