"""What a tool parser finds in a model's output, in the order in which the output says it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Text that belongs to no tool call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins: its name is complete, and its arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """The next characters of the arguments of the current call, which are a JSON object."""

    text: str


@dataclass(frozen=True)
class CallEnd:
    """The arguments of the current call are complete."""


@dataclass(frozen=True)
class CallBroken:
    """The current call turns out to be malformed or is cut off: `text` is what the model wrote."""

    text: str


Event = Text | CallStart | Arguments | CallEnd | CallBroken


class Malformed(ValueError):
    """The output does not continue as the format of tool calls requires.

    `unread` is the character that does not fit, or "" at the end of the output.
    """

    def __init__(self, unread: str):
        super().__init__(unread)
        self.unread = unread
