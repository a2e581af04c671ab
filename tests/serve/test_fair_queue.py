"""The queue alone: whose turn it is, who gives way, and how long it takes."""

import time

import pytest

from fairkv_jax.engine.request import Request, ValidatedRequest
from fairkv_jax.serve.fair_queue import FairQueue, Group


def group(name: str, num_choices: int = 1) -> Group:
    """The choices of a prompt; the first letter of their ids is the client."""
    names = [name] if num_choices == 1 else [f"{name}.{choice}" for choice in range(num_choices)]
    return tuple(ValidatedRequest(Request(each, [1]), 1) for each in names)


def queue_of(*names: str) -> FairQueue:
    queue = FairQueue()
    for name in names:
        queue.push(name[0], [group(name)])
    return queue


def names_of(each: Group) -> str:
    return " ".join(request.request_id for request in each)


def order(queue: FairQueue) -> list[str]:
    left = []
    while queue:
        left.append(names_of(queue.pop()))
    return left


def test_clients_take_turns_and_each_keeps_its_order():
    queue = queue_of("a1", "a2", "a3", "b1", "c1", "c2")
    assert order(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_client_that_comes_later_is_served_in_the_next_turn():
    queue = queue_of("a1", "a2", "a3", "a4")
    assert [names_of(queue.pop()), names_of(queue.pop())] == ["a1", "a2"]
    queue.push("b", [group("b1")])
    assert order(queue) == ["a3", "b1", "a4"]


def test_choices_leave_together_and_count_as_many_turns():
    queue = queue_of("b1", "b2", "b3")
    queue.push("a", [group("a1", 2)])
    queue.push("a", [group("a2")])
    assert len(queue) == 6
    assert queue.count("a") == 3
    assert order(queue) == ["b1", "a1.0 a1.1", "b2", "b3", "a2"]


def test_a_client_cannot_shorten_its_turns_by_asking_one_by_one():
    """Its next group waits although none of it is in the queue meanwhile."""
    queue = queue_of("b1", "b2", "b3", "b4")
    queue.push("a", [group("a1", 3)])
    assert [names_of(queue.pop()), names_of(queue.pop())] == ["b1", "a1.0 a1.1 a1.2"]
    queue.push("a", [group("a2")])
    assert order(queue) == ["b2", "b3", "b4", "a2"]


def test_new_clients_without_end_starve_nobody():
    queue = queue_of("a1", "a2", "a3")
    left = []
    for index in range(9):
        queue.push(f"new {index}", [group(f"new {index}")])
        left.append(names_of(queue.pop()))
    assert {"a1", "a2", "a3"} <= set(left)


def test_an_empty_queue_remembers_nobody():
    queue = queue_of()
    for index in range(100):
        queue.push(f"client {index}", [group(f"{index}", 3)])
        queue.pop()
    assert not queue._next_turn


def test_requests_are_removed_wherever_they_wait():
    queue = queue_of("a1", "a2", "b1", "b2")
    queue.push("c", [group("c1", 3)])
    assert queue.remove({"a2", "b1", "c1.1", "elsewhere"}) == {"a2", "b1", "c1.1"}
    assert len(queue) == 4
    assert queue.remove({"a1"}) == {"a1"}
    assert order(queue) == ["b2", "c1.0 c1.2"]


def test_the_newest_of_the_longest_queues_give_way():
    queue = queue_of("a1", "a2", "a3", "a4", "b1", "b2", "b3", "c1")

    def newest(num_requests: int, more_than: int) -> list[str] | None:
        found = queue.newest(num_requests, more_than)
        return None if found is None else [names_of(each) for groups in found for each in groups]

    assert newest(0, 9) == []
    assert newest(1, 1) == ["a4"]
    assert newest(3, 1) == ["a4", "a3", "b3"]
    assert newest(3, 2) == ["a4", "a3", "b3"]
    assert newest(4, 2) is None  # They would have less than who takes their place.
    assert FairQueue().newest(1, 0) is None


def test_an_http_request_gives_way_as_a_whole_and_only_if_none_of_it_has_left():
    queue = queue_of("a1")
    queue.push("a", [group("a2"), group("a3", 2)])
    queue.push("a", [group("a4")])
    assert [[*map(names_of, each)] for each in queue.newest(1, 0) or []] == [["a4"]]
    found = queue.newest(2, 0)
    assert found is not None
    assert [[*map(names_of, each)] for each in found] == [["a2", "a3.0 a3.1"]]
    assert [names_of(queue.pop()), names_of(queue.pop())] == ["a1", "a2"]
    assert queue.newest(2, 0) is None


def test_the_expected_wait_is_that_of_the_queue():
    queue = queue_of(*(f"a{index}" for index in range(20)))
    began = time.monotonic()
    for _ in range(5):
        queue.pop()
        time.sleep(0.02)
    each = (time.monotonic() - began) / 5
    assert queue.expected_wait_s == pytest.approx(15 * each, rel=0.2)
    assert FairQueue().expected_wait_s == 0
