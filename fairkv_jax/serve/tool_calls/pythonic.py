"""The format of Llama 3.2's and ToolACE's calls, a list of calls in Python.

    [get_weather(city='Paris', days=2), get_time(zone='CET')]

https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/text_prompt_format.md
"""

import ast
import json
import warnings
from typing import Any

from fairkv_jax.serve.tool_calls.events import Malformed
from fairkv_jax.serve.tool_calls.json_reader import Reader, expect, skip_space
from fairkv_jax.serve.tool_calls.parser import ToolParser

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_JSON_LITERALS = {"true": True, "false": False, "null": None}


class PythonicParser(ToolParser):
    """Parses a list of calls at the beginning of a line; arguments are sent one by one, as JSON."""

    markers = ("[",)

    def __init__(self) -> None:
        super().__init__()
        self._begins_line = True

    def _may_begin(self) -> bool:
        return self._begins_line or "\n" in self._space

    def _add_text(self, text: str) -> None:
        super()._add_text(text)
        if text.strip():
            self._begins_line = False

    def _read_calls(self, marker: str) -> Reader:
        char = yield
        while True:
            char = yield from skip_space(char)
            char = yield from self._read_call(char)
            char = yield from skip_space(char)
            is_last = char != ","
            if not is_last:
                char = yield from skip_space((yield))
            if char == "]":
                return (yield)
            if is_last:
                raise Malformed(char)

    def _read_call(self, char: str) -> Reader:
        name: list[str] = []
        char = yield from _read_name(char, name)
        char = yield from skip_space(char)
        char = yield from expect("(", char)
        char = yield from skip_space(char)
        keys: set[str] = set()
        while char != ")":
            key: list[str] = []
            char = yield from _read_name(char, key)
            char = yield from skip_space(char)
            char = yield from expect("=", char)
            keyword = "".join(key)
            if keyword in keys:
                raise Malformed(char)
            source: list[str] = []
            char = yield from _read_source(char, source)
            value = _as_json("".join(source), char)
            if not keys:
                self._start_call("".join(name))
            self._add_arguments(f"{', ' if keys else '{'}{json.dumps(keyword)}: {value}")
            keys.add(keyword)
            if char == ",":
                char = yield from skip_space((yield))
        if not keys:
            self._start_call("".join(name))
        self._add_arguments("}" if keys else "{}")
        self._end_call()
        return (yield)


def _read_name(char: str, name: list[str]) -> Reader:
    """Reads an identifier, whose parts may be separated by dots."""
    while char and (char.isalnum() or char in "_."):
        name.append(char)
        char = yield
    if not all(part.isidentifier() for part in "".join(name).split(".")):
        raise Malformed(char)
    return char


def _read_source(char: str, source: list[str]) -> Reader:
    """Reads an expression up to the comma or the parenthesis that ends it, which is returned."""
    closing: list[str] = []
    while closing or not char or char not in ",)":
        if not char or (char in _CLOSING.values() and closing[-1:] != [char]):
            raise Malformed(char)
        source.append(char)
        if char in "'\"":
            char = yield from _read_quoted(char, source)
            continue
        if char in _CLOSING:
            closing.append(_CLOSING[char])
        elif closing and char == closing[-1]:
            closing.pop()
        char = yield
    return char


def _read_quoted(quote: str, source: list[str]) -> Reader:
    """Reads the rest of a string, including its closing quotation mark."""
    char = yield
    while char != quote:
        for _ in range(2 if char == "\\" else 1):
            if not char:
                raise Malformed(char)
            source.append(char)
            char = yield
    source.append(char)
    return (yield)


def _as_json(source: str, unread: str) -> str:
    """Returns a Python literal as JSON; JSON's own true, false and null are accepted too.

    Raises:
        Malformed: it is not a literal that JSON can represent.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as "\\d"
            parsed = ast.parse(source.strip(), mode="eval")
        text = json.dumps(_literal(parsed.body), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise Malformed(unread) from None
    return text


def _literal(node: ast.expr) -> Any:
    """Evaluates a literal.

    Raises:
        ValueError: it is another expression, or of a type that JSON lacks.
    """
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=name) if name in _JSON_LITERALS:
            return _JSON_LITERALS[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(each) for each in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str() as key):
            return key
    raise ValueError("not a text as a key")
