"""Puts outputs through parsers, whole and in pieces, as the server does."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fairkv_jax.serve.message import MessageBuilder

Build = Callable[[], MessageBuilder]


def joined(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of deltas; a call's id and name come first, and once."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                assert delta[name]
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", []):
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                calls.append({**call, "function": {**call["function"], "arguments": ""}})
            else:
                assert call["index"] == len(calls) - 1
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = [
            {key: value for key, value in call.items() if key != "index"} for call in calls
        ]
    if not message["content"] and set(message) != {"role", "content"}:
        message["content"] = None
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": bool(call["id"])} for call in message.get("tool_calls", [])]
    return {**message, "tool_calls": calls}


def said(text: str | None, *calls: tuple[str, str], reasoning: str = "") -> dict[str, Any]:
    """A message as `without_ids` returns it."""
    thought = {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}
    return {
        "role": "assistant",
        "content": text,
        **thought,
        "tool_calls": [
            {"id": True, "type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ],
    }


def whole(build: Build, output: str) -> dict[str, Any]:
    return without_ids(build().message(output))


def streamed(build: Build, pieces: Iterable[str]) -> dict[str, Any]:
    builder = build()
    deltas = [builder.delta(piece) for piece in pieces]
    return without_ids(joined([*deltas, builder.delta("", is_last=True)]))


def divisions(output: str) -> Iterator[list[str]]:
    """The output in one piece, in two for every place between characters, and character-wise."""
    yield [output]
    yield list(output)
    yield from ([output[:place], output[place:]] for place in range(1, len(output)))
