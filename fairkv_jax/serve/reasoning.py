"""Separates the reasoning of models that think between <think> and </think> from their answer."""

from dataclasses import dataclass

START = "<think>"
END = "</think>"


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family of models marks its reasoning."""

    is_assumed: bool
    """Whether an output begins with reasoning even if no `<think>` says so."""

    def parser(self, prompt: str) -> "ReasoningParser":
        """Returns a parser for an output that follows this prompt.

        Chat templates that open the reasoning themselves end a prompt with `<think>`; those that
        are asked not to think end it with `<think></think>`.
        """
        ending = prompt.rstrip()
        if ending.endswith(END):
            return ReasoningParser("content")
        return ReasoningParser("unknown", is_assumed=self.is_assumed or ending.endswith(START))


def continued(text: str) -> "ReasoningParser":
    """Returns a parser for an output that continues a message."""
    return ReasoningParser("reasoning" if text.rfind(START) > text.rfind(END) else "content")


REASONING_FORMATS = {
    "deepseek_r1": ReasoningFormat(is_assumed=True),
    "qwen3": ReasoningFormat(is_assumed=False),
}
"""The values of --reasoning-parser; the names are vLLM's."""


class ReasoningParser:
    """Divides an output that arrives in pieces; the division does not depend on the pieces.

    The state is "unknown" until the output shows whether it begins with reasoning, then
    "reasoning", then "content".
    """

    def __init__(self, state: str, *, is_assumed: bool = False):
        self._state = state
        self._is_assumed = is_assumed
        self._held = ""
        self._num_read = 0
        self._end = 0 if state == "content" else None

    @property
    def end(self) -> int | None:
        """How much of the output belongs to the reasoning: the characters up to the end of its
        `</think>`, 0 without reasoning, None if it has not ended."""
        return 0 if self._state == "unknown" and not self._is_assumed else self._end

    @property
    def precedes(self) -> str | None:
        """Whether reasoning comes first, as `StructuredOutputsParams.reasoning` says it."""
        if self._state == "content":
            return None
        return "required" if self._state == "reasoning" or self._is_assumed else "optional"

    def push(self, text: str) -> tuple[str, str]:
        """Reads more of the output, and returns what it adds to the reasoning and the content."""
        self._held += text
        self._num_read += len(text)
        if self._state == "unknown":
            self._recognise()
        if self._state == "reasoning":
            return self._read_reasoning()
        if self._state == "unknown":
            return "", ""
        content, self._held = self._held, ""
        return "", content

    def finish(self) -> tuple[str, str]:
        """Ends the output, and returns what has been held back."""
        rest, self._held = self._held, ""
        is_reasoning = self._is_assumed if self._state == "unknown" else self._state == "reasoning"
        return (rest, "") if is_reasoning else ("", rest)

    def _recognise(self) -> None:
        """Decides how the output begins, unless it may yet become `<think>`."""
        beginning = self._held.lstrip()
        if beginning.startswith(START):
            self._held = beginning.removeprefix(START)
            self._state = "reasoning"
        elif not START.startswith(beginning):
            self._state = "reasoning" if self._is_assumed else "content"
            self._end = None if self._is_assumed else 0

    def _read_reasoning(self) -> tuple[str, str]:
        reasoning, end, content = self._held.partition(END)
        if end:
            self._state, self._held = "content", ""
            self._end = self._num_read - len(content)
            return reasoning, content
        num_held = next(
            size for size in range(len(END) - 1, -1, -1) if self._held.endswith(END[:size])
        )
        cut = len(self._held) - num_held
        reasoning, self._held = self._held[:cut], self._held[cut:]
        return reasoning, ""
