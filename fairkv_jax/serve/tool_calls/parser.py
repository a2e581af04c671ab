"""What all parsers of tool calls share: telling calls from text, one character at a time."""

import json
import re
from abc import ABC, abstractmethod
from itertools import groupby
from typing import ClassVar
from uuid import uuid4

from fairkv_jax.serve.tool_calls.events import (
    Arguments,
    CallBroken,
    CallEnd,
    CallStart,
    Event,
    Malformed,
    Text,
)
from fairkv_jax.serve.tool_calls.json_reader import (
    Reader,
    expect,
    read_string,
    read_value,
    skip_space,
)


class ToolParser(ABC):
    """Finds the tool calls in an output that arrives in pieces.

    However the output is divided into pieces, the events are the same but for the division of
    texts and arguments. White space before a call and between calls is not text. What turns out not
    to be a call is text, unless its name has been reported: then it is a `CallBroken`.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    """The texts with which calls begin."""
    endings: ClassVar[tuple[str, ...]] = ()
    """The texts that are dropped where they follow a call."""
    special_tokens: ClassVar[bool] = False
    """Whether the format's markers may be special tokens, which must then not be skipped."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._held = ""  # what may become a marker
        self._space = ""  # white space that is text unless it is beside a call
        self._raw: list[str] = []  # what has been read since the marker or the last complete call
        self._reader: Reader | None = None
        self._is_in_call = False
        self._follows_call = False
        first = "".join(each[0] for each in self.markers + self.endings)
        self._beginnings = re.compile(f"[{re.escape(first)}]" if first else "(?!)")

    def push(self, text: str) -> list[Event]:
        """Reads more of the output, and returns what it tells."""
        place = 0
        while place < len(text):
            if self._reader is None and not self._held:
                found = self._beginnings.search(text, place)
                end = found.start() if found else len(text)
                self._add_text(text[place:end])
                place = end
            if place < len(text):
                self._take(text[place])
                place += 1
        return self._drain()

    def finish(self) -> list[Event]:
        """Ends the output, and returns what that tells."""
        if self._reader is not None:
            self._read("")
        self._add_text(self._held)
        self._held = ""
        if not self._follows_call:
            self._emit(Text(self._space))
        self._space = ""
        return self._drain()

    @staticmethod
    def new_call_id() -> str:
        """Returns an id that no other call has."""
        return f"chatcmpl-tool-{uuid4().hex}"

    @abstractmethod
    def _read_calls(self, marker: str) -> Reader:
        """Reads one or more calls that follow a marker."""

    def _may_begin(self) -> bool:
        """Returns whether a marker at this place of the text begins a call."""
        return True

    def _take(self, char: str) -> None:
        if self._reader is not None:
            self._read(char)
            return
        texts = self.markers + (self.endings if self._follows_call else ())
        self._held += char
        while self._held and not any(each.startswith(self._held) for each in texts):
            self._add_text(self._held[0])
            self._held = self._held[1:]
            texts = self.markers + (self.endings if self._follows_call else ())
        if self._held in self.endings and self._follows_call:
            self._held = ""
        elif self._held in self.markers:
            marker, self._held = self._held, ""
            if self._may_begin():
                self._begin(marker)
            else:
                self._add_text(marker)

    def _begin(self, marker: str) -> None:
        self._raw = [marker]
        self._reader = self._read_calls(marker)
        next(self._reader)

    def _read(self, char: str) -> None:
        """Sends a character to the reader of calls; what it does not read is text again."""
        assert self._reader is not None
        self._raw.append(char)
        try:
            self._reader.send(char)
            return
        except StopIteration as end:
            unread, raw = end.value, ""
        except Malformed as fault:
            unread = fault.unread
            raw = "".join(self._raw).removesuffix(unread)
        self._reader, self._raw = None, []
        if self._is_in_call:
            self._is_in_call = self._follows_call = False
            self._emit(CallBroken(raw))
        else:
            self._add_text(raw)
        for each in unread:
            self._take(each)

    def _add_text(self, text: str) -> None:
        """Reports text, but for white space at its end, which a call may follow."""
        written = text.rstrip()
        if written:
            self._emit(Text(self._space + written))
            self._space = ""
            self._follows_call = False
        self._space += text[len(written) :]

    def _start_call(self, name: str) -> None:
        """Reports the name of a call whose format has been recognised."""
        self._raw.insert(0, self._space)
        self._space = ""
        self._follows_call = self._is_in_call = True
        self._emit(CallStart(name))

    def _add_arguments(self, text: str) -> None:
        self._emit(Arguments(text))

    def _end_call(self) -> None:
        self._is_in_call = False
        self._raw = []
        self._emit(CallEnd())

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _drain(self) -> list[Event]:
        """Returns the new events; texts and arguments that follow each other are joined."""
        events, self._events = self._events, []
        joined: list[Event] = []
        for kind, group in groupby(events, type):
            same = list(group)
            text = "".join(each.text for each in same if isinstance(each, Text | Arguments))
            if kind not in (Text, Arguments):
                joined += same
            elif text:
                joined.append(Text(text) if kind is Text else Arguments(text))
        return joined

    def _read_call_object(self, char: str) -> Reader:
        """Reads a call as the JSON object {"name": ..., "arguments": {...}}.

        The members may come in any order, "parameters" stands for "arguments" too, and other
        members are ignored. The arguments may also be the text of an object, as some models write.
        """
        name: str | None = None
        arguments: str | None = None  # if they came before the name; else "" once they are read
        char = yield from expect("{", char)
        char = yield from skip_space(char)
        while True:
            key: list[str] = []
            char = yield from read_string(char, key.append)
            char = yield from skip_space(char)
            char = yield from expect(":", char)
            char = yield from skip_space(char)
            value: list[str] = []
            match json.loads("".join(key)):
                case "name" if name is None:
                    char = yield from read_string(char, value.append)
                    name = _as_name("".join(value), char)
                    if arguments is not None:
                        self._start_call(name)
                        self._add_arguments(arguments)
                case "arguments" | "parameters" if arguments is None:
                    if name is not None and char == "{":
                        self._start_call(name)
                        char = yield from read_value(char, self._add_arguments)
                        arguments = ""
                    else:
                        char = yield from read_value(char, value.append)
                        arguments = _as_object("".join(value), char)
                        if name is not None:
                            self._start_call(name)
                            self._add_arguments(arguments)
                case "name" | "arguments" | "parameters":
                    raise Malformed(char)  # it is given twice
                case _:
                    char = yield from read_value(char, value.append)
            char = yield from skip_space(char)
            if char != ",":
                break
            char = yield from skip_space((yield))
        if char != "}" or not self._is_in_call:
            raise Malformed(char)
        self._end_call()
        return (yield)

    def _read_call_array(self, char: str) -> Reader:
        """Reads calls as the JSON array [{"name": ..., "arguments": {...}}, ...]."""
        char = yield from expect("[", char)
        while True:
            char = yield from skip_space(char)
            char = yield from self._read_call_object(char)
            char = yield from skip_space(char)
            if char != ",":
                return (yield from expect("]", char))
            char = yield


def _as_name(text: str, unread: str) -> str:
    """Returns the function's name that a JSON string holds.

    Raises:
        Malformed: it is empty or has blanks, control characters or unpaired surrogates.
    """
    name = json.loads(text)
    if not name or not name.isprintable() or " " in name:
        raise Malformed(unread)
    return name


def _as_object(text: str, unread: str) -> str:
    """Returns arguments that are an object or the text of one, as the text of an object.

    Raises:
        Malformed: they are neither.
    """
    if text.startswith('"'):
        text = json.loads(text).strip()
        if not _is_json(text):
            raise Malformed(unread)
    if not text.startswith("{"):
        raise Malformed(unread)
    return text


def _is_json(text: str) -> bool:
    """Returns whether a text is one JSON value that UTF-8 can represent."""
    reader = read_value(text[:1], lambda char: None)
    try:
        text.encode()
        next(reader)
        for char in text[1:]:
            reader.send(char)
        reader.send("")
    except (UnicodeEncodeError, Malformed):
        return False
    except StopIteration as end:
        return end.value == ""
    return False
