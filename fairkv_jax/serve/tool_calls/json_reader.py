"""Reads JSON one character at a time, so that arguments can be sent on before they are complete.

The functions are generators that are sent one character at a time, and "" at the end of the text.
They return the first character after what they read, and raise `Malformed` where the text is not
JSON. They are iterative: the nesting of a value is limited by memory only.
"""

import re
from collections.abc import Callable, Generator

from fairkv_jax.serve.tool_calls.events import Malformed

Reader = Generator[None, str, str]
"""Is sent characters; returns the first one that it has not read."""
Sink = Callable[[str], object]
"""Receives the characters that are read."""

SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = "0123456789+-.eE"
_ESCAPED = '"\\/bfnrt'
_HEX = "0123456789abcdefABCDEF"
_CLOSING = {"{": "}", "[": "]"}


def skip_space(char: str, sink: Sink | None = None) -> Reader:
    """Reads white space, of which `char` may be the first."""
    while char and char in SPACE:
        if sink is not None:
            sink(char)
        char = yield
    return char


def expect(wanted: str, char: str, sink: Sink | None = None) -> Reader:
    """Reads a fixed text that begins with `char`."""
    for each in wanted:
        if char != each:
            raise Malformed(char)
        if sink is not None:
            sink(char)
        char = yield
    return char


def read_value(char: str, sink: Sink) -> Reader:
    """Reads a JSON value that begins with `char`; white space within it goes to the sink too."""
    closing: list[str] = []  # of the objects and arrays that are open
    while True:
        if char and char in _CLOSING:
            closing.append(_CLOSING[char])
            sink(char)
            char = yield from skip_space((yield), sink)
            if char != closing[-1]:
                if closing[-1] == "}":
                    char = yield from _read_key(char, sink)
                continue  # with the first value inside
        else:
            char = yield from _read_scalar(char, sink)
        while closing:
            char = yield from skip_space(char, sink)
            if char == closing[-1]:
                closing.pop()
                sink(char)
                char = yield
            elif char == ",":
                sink(char)
                char = yield from skip_space((yield), sink)
                if closing[-1] == "}":
                    char = yield from _read_key(char, sink)
                break  # to the next value
            else:
                raise Malformed(char)
        else:
            return char


def _read_key(char: str, sink: Sink) -> Reader:
    """Reads the name of an object's member, the colon and the white space around it."""
    char = yield from read_string(char, sink)
    char = yield from skip_space(char, sink)
    char = yield from expect(":", char, sink)
    return (yield from skip_space(char, sink))


def read_string(char: str, sink: Sink) -> Reader:
    """Reads a string with its quotation marks."""
    char = yield from expect('"', char, sink)
    while char != '"':
        if char < " ":  # a control character, or the end of the text
            raise Malformed(char)
        sink(char)
        following = yield
        char = (yield from _read_escape(following, sink)) if char == "\\" else following
    sink(char)
    return (yield)


def _read_escape(char: str, sink: Sink) -> Reader:
    """Reads what follows a backslash."""
    for allowed in (_ESCAPED + "u", *[_HEX] * (4 if char == "u" else 0)):
        if not char or char not in allowed:
            raise Malformed(char)
        sink(char)
        char = yield
    return char


def _read_scalar(char: str, sink: Sink) -> Reader:
    if char == '"':
        return (yield from read_string(char, sink))
    for literal in ("true", "false", "null"):
        if char == literal[0]:
            return (yield from expect(literal, char, sink))
    number = ""
    while char and char in _NUMBER_CHARACTERS:
        number += char
        sink(char)
        char = yield
    if not _NUMBER.fullmatch(number):
        raise Malformed(char)
    return char
