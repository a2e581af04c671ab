"""The scheduler without a model: random arrivals, aborts and pressure, on a device that checks."""

import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fairkv_jax.engine.decode_compression import DecodeCompression
from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.prefill_chunking import Packing
from fairkv_jax.engine.prefix_cache import Prefix
from fairkv_jax.engine.scheduled_request import ScheduledRequest, Segment
from fairkv_jax.engine.scheduler import Scheduler
from fairkv_jax.engine.scheduler_output import NewRequest, NewTokens, SchedulerOutput
from fairkv_jax.engine.timings import Timings
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sampling_params import SamplingParams
from fairkv_jax.sharding.slots import SlotLayout
from tests.engine.drive import check_references
from tests.engine.fake_device import FakeDevice, token

MAX_TOKENS = 64
CHUNK = 16
PAGE = 8
PREFIXES = {"a": 11, "b": 24, "cc": 62, "dddd": 30}
"""Tokens by key; "dddd" goes on after "a"."""
FAST = Timings(step_seconds=0.01, prefill_work_per_second=400.0)
"""Four decode steps at once, five chunks beside them, and a hundred alone."""


def make_layout(num_devices: int) -> SlotLayout:
    """Two layers of three heads; on several devices some heads have two replicas."""
    profile = Profile("", "ada_snapkv", 50, ((90.0, 30.0, 20.0), (10.0, 25.0, 80.0)))
    return SlotLayout.from_plan(make_plan(profile, num_devices, max_extra_replicas=1))


def make_scheduler(
    num_devices: int,
    num_rows: int,
    spare_pages: int,
    sharing: int = 1,
    compression: DecodeCompression | None = None,
) -> Scheduler:
    """With pages for one row of full length and as many more on each device."""
    layout = make_layout(num_devices)
    one_row = int(layout.replicas.sum((0, 1)).max()) * -(-MAX_TOKENS // PAGE)
    spec = KVCacheSpec(
        num_layers=2,
        num_rows=num_rows,
        num_devices=num_devices,
        slots_per_device=layout.slots_per_device,
        head_dim=16,
        page_size=PAGE,
        pages_per_device=one_row + spare_pages,
        max_tokens=MAX_TOKENS,
        sharing=sharing,
    )
    return Scheduler(
        KVCacheManager(spec, layout),
        lambda request_id: np.zeros(1, np.uint32),
        decode_compression=compression,
        packing=Packing(2 * CHUNK, 3, chunk_work),
    )


def make_request(
    name: str,
    arrival: int,
    prompt_tokens: int,
    max_tokens: int,
    *,
    grammar: bool = False,
    prefixes: Sequence[Prefix] = (),
    whole_prompt: Prefix | None = None,
    keeps_whole: bool = False,
) -> ScheduledRequest:
    """A request whose prompt begins with a chain of prefixes; `prompt_tokens` come after them.

    Prompts of which nothing is dropped have other tokens.
    """
    prompt, segments = [], []
    for prefix in prefixes:
        tokens = range(1000 * len(prefix.key), 1000 * len(prefix.key) + prefix.num_tokens)
        segments.append(make_segment(len(prompt), prefix.num_tokens, prefix))
        prompt += tokens[len(prompt) :]
    if prompt_tokens:
        start, first = len(prompt), 5000 if keeps_whole else 0
        segments.append(make_segment(start, start + prompt_tokens, keeps_whole=keeps_whole))
        prompt += range(first, first + prompt_tokens)
    new = NewRequest(name, prompt, SamplingParams(), seed=0)
    limit = min(max_tokens, MAX_TOKENS - len(prompt)) if prompt_tokens else 0
    return ScheduledRequest(
        new,
        arrival,
        limit,
        tuple(segments),
        follows_grammar=grammar,
        whole_prompt=whole_prompt,
    )


def chunk_work(num_tokens: int) -> np.ndarray:
    return np.ones(2 * -(-num_tokens // CHUNK))


def make_segment(
    start: int, stop: int, prefix: Prefix | None = None, *, keeps_whole: bool = False
) -> Segment:
    work = chunk_work(stop - start)
    return Segment(start, stop, work, len(work), prefix, keeps_whole=keeps_whole)


class Driver:
    """Drives a scheduler over a fake device, as the engine does over a real one."""

    def __init__(self, scheduler: Scheduler, *, keeps_all: bool = False):
        self.scheduler = scheduler
        manager = scheduler.kv_cache
        self.device = FakeDevice(manager.spec, manager._layout, keeps_all=keeps_all)
        self.in_flight: deque = deque()
        self.outputs: list[SchedulerOutput] = []
        self.tokens: dict[str, list[int]] = {}
        self.max_tokens: dict[str, int] = {}
        self.num_cached: dict[str, int] = {}
        self.finished: list[str] = []

    def add(self, request: ScheduledRequest) -> None:
        self.tokens[request.request_id] = []
        self.max_tokens[request.request_id] = request.max_tokens
        self.scheduler.add(request)

    def abort(self, name: str) -> None:
        self.scheduler.abort(name)
        self.tokens.pop(name, None)

    def schedule(self, timings: Timings = FAST) -> SchedulerOutput | None:
        if len(self.in_flight) == 2:
            return None
        output = self.scheduler.schedule(timings)
        if output is not None:
            self.outputs.append(output)
            waiting = self.scheduler.waiting
            if (
                waiting
                and self.scheduler.has_free_row
                and waiting[0].head_lengths is None
                and waiting[0].chunks_scheduled > 0
            ):
                decode = output.decode
                assert decode is None or decode.num_steps == 1, "a prompt waits for the others"
            self.in_flight.append((output, self.device.execute(output)))
        return output

    def read(self) -> None:
        output, result = self.in_flight.popleft()
        self.process(self.scheduler.update(output, result))

    def process(self, new_tokens: Iterable[NewTokens]) -> None:
        for new in new_tokens:
            have = self.tokens[new.request_id]
            for step in new.steps:
                assert new.sampled is not None
                have.append(int(new.sampled.tokens[step, new.row]))
            if new.prefill is not None:
                self.num_cached[new.request_id] = new.num_cached_tokens
            limit = self.max_tokens[new.request_id]
            if len(have) >= limit:
                del have[limit:]
                self.scheduler.abort(new.request_id)
                self.finished.append(new.request_id)
                assert have == [token(new.request_id, i) for i in range(limit)]

    def step(self, timings: Timings = FAST) -> None:
        self.process(self.scheduler.take_cached())
        while self.schedule(timings) is not None:
            pass
        assert self.in_flight or not len(self.scheduler), "it waits for nothing"
        if self.in_flight:
            self.read()

    def run(self, timings: Timings = FAST, most_steps: int = 2000) -> None:
        for _ in range(most_steps):
            if not len(self.scheduler) and not self.in_flight:
                break
            self.step(timings)
        assert not len(self.scheduler), "a request starves"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests arrive, are aborted and end, in any interleaving with the devices."""

    @initialize(
        num_devices=st.sampled_from([1, 2, 3]),
        num_rows=st.integers(1, 4),
        spare_pages=st.integers(0, 40),
        sharing=st.sampled_from([1, 4]),
        compression=st.none()
        | st.builds(
            DecodeCompression, st.integers(10, 40), st.integers(1, 12), num_protected=st.just(8)
        ),
    )
    def start(
        self,
        num_devices: int,
        num_rows: int,
        spare_pages: int,
        sharing: int,
        compression: DecodeCompression | None,
    ) -> None:
        scheduler = make_scheduler(num_devices, num_rows, spare_pages, sharing, compression)
        self.driver = Driver(scheduler)
        self.arrivals = 0
        self.prefixes = {key: Prefix(key, num_tokens) for key, num_tokens in PREFIXES.items()}

    @rule(
        prompt_tokens=st.integers(1, MAX_TOKENS - 1),
        max_tokens=st.integers(0, MAX_TOKENS),
        grammar=st.booleans(),
    )
    def add(self, prompt_tokens: int, max_tokens: int, grammar: bool) -> None:
        self._add(prompt_tokens, max_tokens, grammar=grammar)

    @rule(prompt_tokens=st.integers(1, 12), max_tokens=st.integers(0, 24))
    def add_short(self, prompt_tokens: int, max_tokens: int) -> None:
        """Two of which nothing is dropped, so that they share their chunks."""
        for _ in range(2):
            self._add(prompt_tokens, max_tokens, keeps_whole=True)

    @rule(
        chain=st.sampled_from(["a", "b", "cc", "dddd"]),
        suffix_tokens=st.integers(0, 30),
        max_tokens=st.integers(0, MAX_TOKENS),
    )
    def add_to_prefix(self, chain: str, suffix_tokens: int, max_tokens: int) -> None:
        """Asks about a prefix, or only computes it."""
        keys = {"a": ["a"], "b": ["b"], "cc": ["cc"], "dddd": ["a", "dddd"]}[chain]
        prefixes = [self.prefixes[key] for key in keys]
        left = MAX_TOKENS - 1 - prefixes[-1].num_tokens
        self._add(min(suffix_tokens, left), max_tokens, prefixes=prefixes)

    @rule(
        prompt_tokens=st.integers(1, 24),
        max_tokens=st.integers(1, 24),
        grammar=st.booleans(),
        begins=st.booleans(),
    )
    def add_choices(self, prompt_tokens: int, max_tokens: int, grammar: bool, begins: bool) -> None:
        """Three answers to one prompt, which may begin with a prefix."""
        prefixes = [self.prefixes["a"]] if begins else []
        whole = Prefix(f"choices {self.arrivals}", prompt_tokens, is_deleted=True)
        for _ in range(3):
            self._add(
                prompt_tokens, max_tokens, grammar=grammar, prefixes=prefixes, whole_prompt=whole
            )

    def _add(self, prompt_tokens: int, max_tokens: int, **options: Any) -> None:
        name = str(self.arrivals)
        self.driver.add(make_request(name, self.arrivals, prompt_tokens, max_tokens, **options))
        self.arrivals += 1

    @rule(key=st.sampled_from(["a", "b", "cc", "dddd"]))
    def delete(self, key: str) -> None:
        """Gives up a prefix; whoever asks for it later gets another one of the same tokens."""
        self.driver.scheduler.prefixes.delete(self.prefixes[key])
        self.prefixes[key] = Prefix(key, PREFIXES[key])

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = [each.request_id for each in self.driver.scheduler._requests()]
        self.driver.abort(data.draw(st.sampled_from([*names, "nobody"])))

    @rule(step_seconds=st.sampled_from([None, 0.001, 0.01, 1.0]))
    def schedule(self, step_seconds: float | None) -> None:
        self.driver.schedule(Timings(step_seconds, 400.0))

    @precondition(lambda self: self.driver.in_flight)
    @rule()
    def read(self) -> None:
        self.driver.read()

    @rule()
    def fail(self) -> None:
        """The devices lose everything; only tokens that have been handed out count."""
        self.driver.in_flight.clear()
        self.driver.scheduler.reset(self.driver.tokens)
        manager = self.driver.scheduler.kv_cache
        self.driver.device = FakeDevice(manager.spec, manager._layout)
        self.driver.device.has_failed = True
        assert not manager.used_pages.any()
        assert not len(self.driver.scheduler.prefixes)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "driver"):
            return
        scheduler = self.driver.scheduler
        manager = scheduler.kv_cache
        spec = manager.spec
        assert len(scheduler.running) <= spec.num_rows
        arrivals = [each.arrival for each in scheduler.waiting]
        assert arrivals == sorted(arrivals), "first come, first served"
        lengths = manager.lengths
        held = {each.shared_row for each in scheduler.waiting} - {None}
        assert len(held) <= 1
        assert set(np.flatnonzero(lengths.any((0, 2)))) == {*scheduler.running, *held}
        check_references(scheduler)
        assert (manager.committed_lengths <= lengths).all()

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.driver.run()
        assert not any(prefix.users for prefix in self.driver.scheduler.prefixes)
        self.driver.scheduler.prefixes.clear()
        assert not self.driver.scheduler.kv_cache.used_pages.any()


class TestScheduler(SchedulerMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40)


@pytest.mark.long
class TestSchedulerLong(SchedulerMachine.TestCase):
    settings = settings(
        max_examples=int(os.environ.get("SCHEDULER_EXAMPLES", "1500")), stateful_step_count=80
    )


def test_nobody_overtakes_and_all_finish_under_pressure():
    driver = Driver(make_scheduler(2, num_rows=4, spare_pages=6))
    for i in range(12):
        driver.add(make_request(str(i), i, 5 + 4 * i, 50))
    first_inserted = []
    for _ in range(2000):
        if not len(driver.scheduler):
            break
        driver.step()
    for output in driver.outputs:
        name = output.insertion.request_id if output.insertion else None
        if name is not None and name not in first_inserted:
            first_inserted.append(name)
    assert driver.scheduler.num_preemptions > 0
    assert first_inserted == [str(i) for i in range(12)]
    assert len(driver.finished) == 12


def test_packed_prompts_that_wait_for_pages_are_prefilled_again_after_a_preemption():
    """The first of them has run, and takes the place of what the prefill left for the others."""
    driver = Driver(make_scheduler(1, num_rows=4, spare_pages=0))
    driver.add(make_request("0", 0, 40, 20))
    for name in "123":
        driver.add(make_request(name, int(name), 9, 30, keeps_whole=True))
    driver.run()
    begun = [each.prefill for each in driver.outputs if each.prefill and each.prefill.new_request]
    assert max(len(each.packed) for each in begun) == 2
    assert driver.scheduler.num_preemptions > 0
    prefilled = [each.request_id for prefill in begun for each in prefill.packed]
    prefilled += [prefill.request_id for prefill in begun]
    assert prefilled.count("3") > 1
    assert sorted(driver.finished) == ["0", "1", "2", "3"]


def test_a_document_that_many_rows_share_is_copied_to_other_replicas():
    """So that its copied heads serve some of the rows there; the copies are evicted first."""
    balance = {}
    for copies in (False, True):
        scheduler = make_scheduler(2, num_rows=8, spare_pages=400, sharing=8)
        document, driver = Prefix("b", 24), Driver(scheduler)
        if not copies:
            scheduler.prefixes.replicate = lambda prefix, share: None
        for index in range(7):
            driver.add(make_request(str(index), index, 2, 30, prefixes=[document]))
        while len(scheduler.running) < 7:
            driver.step()
        loads = scheduler.kv_cache.tokens_per_device
        balance[copies] = loads.max(1).sum() / loads.mean(1).sum()
        check_references(scheduler)
        assert bool(document.copies) is copies
        assert scheduler.prefixes.evict_unused() is copies
        assert document.pages is not None
        assert not document.copies
        check_references(scheduler)
        driver.run()
        scheduler.prefixes.delete(document)
        assert not scheduler.kv_cache.used_pages.any()
    assert balance[False] > 1.15
    assert balance[True] < 1.05


def test_a_copy_may_take_pages_that_the_same_execution_still_reads_before_it():
    """The last of three choices gives up its prompt's pages, which a document's copy then takes."""
    driver = Driver(make_scheduler(2, num_rows=3, spare_pages=142, sharing=4))
    document, prompt = Prefix("b", 24), Prefix("choices", 5, is_deleted=True)
    driver.add(make_request("0", 0, 18, 12, prefixes=[document]))
    for name in "123":
        driver.add(make_request(name, int(name), 5, 4, whole_prompt=prompt))
    driver.add(make_request("4", 4, 14, 11, prefixes=[document]))
    driver.run()
    assert any(
        output.insertion and output.insertion.fork and output.replications_before_prefill
        for output in driver.outputs
    )


@pytest.mark.parametrize("spare_pages", [3, 9])
def test_no_copy_is_made_that_leaves_too_few_pages_for_its_row(spare_pages: int):
    driver = Driver(make_scheduler(2, num_rows=8, spare_pages=spare_pages, sharing=8))
    document = Prefix("b", 24)
    for index in range(7):
        driver.add(make_request(str(index), index, 2, 30, prefixes=[document]))
    driver.run()
    num_copies = 0
    for output in driver.outputs:
        shares = output.prefill is not None and output.prefill.cached_prefix is not None
        assert shares or not output.replications_before_prefill
        num_copies += len(output.replications_before_prefill)
    assert num_copies


def test_choices_of_a_prompt_are_read_once():
    """Whatever the prompt begins with; their rows hold its pages together."""
    driver = Driver(make_scheduler(2, num_rows=4, spare_pages=100, sharing=4), keeps_all=True)
    manager = driver.scheduler.kv_cache
    whole = Prefix("whole", 40, is_deleted=True)
    for i in range(4):
        driver.add(make_request(str(i), i, 40, 20, whole_prompt=whole))
    while len(driver.scheduler.running) < 4:
        driver.step()
    assert driver.device.num_prefilled_tokens == 40
    full, heads = 40 // PAGE, 6
    assert manager.used_pages.sum() <= heads * (full + 4 * 2)
    assert not len(driver.scheduler.prefixes)
    driver.run()
    assert driver.device.num_prefilled_tokens == 40
    assert not manager.used_pages.any()


def test_choices_are_read_again_if_the_first_is_given_up():
    driver = Driver(make_scheduler(1, num_rows=2, spare_pages=100))
    whole = Prefix("whole", 40, is_deleted=True)
    for i in range(3):
        driver.add(make_request(str(i), i, 40, 20, whole_prompt=whole))
    while not driver.tokens["2"]:
        driver.step()
    driver.abort("0")
    driver.run()
    assert driver.device.num_prefilled_tokens <= 80
    assert driver.finished == ["1", "2"]
    assert not driver.scheduler.kv_cache.used_pages.any()


def test_rows_are_compressed_at_the_same_tokens_after_a_preemption():
    """At every multiple of the interval behind the budget; the device checks what they keep."""
    compression = DecodeCompression(budget=24, interval=8, num_protected=8)
    driver = Driver(make_scheduler(2, num_rows=3, spare_pages=40, compression=compression))
    scheduler = driver.scheduler
    for i in range(4):
        driver.add(make_request(str(i), i, 6, 57))
    for name, num_cached in (("1", 34), ("2", 50)):
        row = None
        while row is None or scheduler.running[row].num_cached < num_cached:
            driver.step()
            row = scheduler.row_of(name)
        scheduler._wait(scheduler._release(row))
    driver.run()
    times = [at for output in driver.outputs for at in output.compressions]
    assert len(times) > sum(map(len, driver.device.compressions.values())), "none was repeated"
    for name, history in driver.device.compressions.items():
        kept = driver.device._kept(range(6), 0)
        first = compression.first_at(kept)
        assert kept.mean() + first - 8 <= 24 < kept.mean() + first
        assert list(history) == list(range(6 + first - 1, 6 + 56 - 1, 8)), name
        for lengths in history.values():
            assert lengths.max() < 6 + 57


@pytest.mark.parametrize(
    ("kept", "first"),
    [(1, 48), (16, 48), (17, 32), (32, 32), (33, 16), (47, 16), (48, 16), (500, 16)],
)
def test_a_row_is_compressed_as_soon_as_it_exceeds_the_budget(kept: int, first: int):
    compression = DecodeCompression(budget=48, interval=16, num_protected=20)
    assert compression.first_at(np.full((2, 3), kept)) == first


def test_a_cached_prefix_counts_towards_the_budget_of_its_layer():
    compression = DecodeCompression(budget=48, interval=16, num_protected=20)
    prefix = np.array([[0, 0, 0], [10, 3, 1], [60, 30, 60]], np.int32)
    budgets = compression.budgets(prefix)
    assert budgets[0].tolist() == [48] * 3
    assert budgets[1].sum() == 3 * 48
    assert (budgets[1] - prefix[1]).tolist() == [44, 43, 43]
    assert (budgets[2] - prefix[2]).tolist() == [20] * 3  # what is protected does not give way


def test_a_request_that_waits_for_pages_slows_nobody():
    """Several steps at once and two executions in flight, although a row is free."""
    driver = Driver(make_scheduler(1, num_rows=3, spare_pages=0), keeps_all=True)
    driver.add(make_request("first", 0, 40, 24))
    driver.add(make_request("second", 1, 62, 2))
    while "first" not in {each.request_id for each in driver.scheduler.running.values()}:
        driver.step()
    while driver.scheduler.waiting[0].head_lengths is None:
        driver.step()
    assert driver.scheduler.has_free_row
    while len(driver.in_flight) < 2:
        output = driver.schedule()
        assert output is not None
        assert output.insertion is None
        assert output.decode is not None
        assert output.decode.num_steps > 1
    driver.run()
    assert sorted(driver.finished) == ["first", "second"]


def test_chunks_follow_the_measured_times():
    """One at a time while nothing is measured; then as many as the streams can bear."""
    driver = Driver(make_scheduler(1, num_rows=2, spare_pages=100))
    driver.add(make_request("a", 0, 16, 40))
    while not driver.scheduler.running:
        driver.step(Timings())
    driver.add(make_request("b", 1, 63, 2))
    unknown = driver.schedule(Timings())
    assert unknown is not None
    assert unknown.prefill is not None
    assert (unknown.prefill.start, unknown.prefill.stop) == (0, 1)
    while driver.in_flight:
        driver.read()
    known = driver.schedule(Timings(step_seconds=0.01, prefill_work_per_second=320.0))
    assert known is not None
    assert known.prefill is not None
    assert (known.prefill.start, known.prefill.stop) == (1, 5)  # 1.25 * 0.01 s * 320/s
    assert known.decode is not None
    assert known.decode.num_steps == 1
    driver.run()


def test_a_preempted_prompt_repeats_nothing_that_was_handed_out():
    """Its log-probabilities and kept positions are known already."""
    driver = Driver(make_scheduler(1, num_rows=2, spare_pages=0), keeps_all=True)
    driver.add(make_request("old", 0, 30, 34))
    late = make_request("new", 1, 20, 40)
    params = SamplingParams(prompt_logprobs=1)
    late.request = replace(late.request, sampling_params=params, return_kept_positions=True)
    (segment,) = late.segments
    work = np.ones(segment.num_cache_chunks + 3)  # with blocks of log-probabilities
    late.segments = (replace(segment, chunk_work=work),)
    driver.add(late)
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    chunks = [each.prefill for each in driver.outputs if each.prefill is not None]
    first, *others = [
        each for each in chunks if each.request_id == "new" and each.new_request is not None
    ]
    assert others
    assert first.num_chunks == segment.num_cache_chunks + 3
    assert first.new_request == late.request
    for each in others:
        assert each.num_chunks == segment.num_cache_chunks
        assert each.new_request is not None
        assert each.new_request.sampling_params.prompt_logprobs is None
        assert not each.new_request.return_kept_positions


@pytest.mark.parametrize("grammar", [False, True])
def test_a_grammar_sees_every_token_before_the_next(grammar: bool):
    driver = Driver(make_scheduler(1, num_rows=2, spare_pages=100))
    driver.add(make_request("a", 0, 16, 40, grammar=grammar))
    while not driver.scheduler.running:
        driver.step()
    while driver.in_flight:
        driver.read()
    first, second = driver.schedule(), driver.schedule()
    assert first is not None
    assert first.decode is not None
    assert (second is None) == grammar
    assert first.decode.num_steps == (1 if grammar else 4)
    assert list(first.decode.grammar_bitmasks) == [0] * grammar
    driver.run()
