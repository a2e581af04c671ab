"""A terminal chat client for a running server: `python -m fairkv_jax.chat --help`.

The client needs neither JAX nor a model. Ctrl-C stops an answer, and Ctrl-D ends the conversation.
"""

import http.client
import json
import os
import ssl
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from absl import app, flags

from fairkv_jax.command_line import with_underscores

_URL = flags.DEFINE_string("base_url", "http://127.0.0.1:8000", "Address of the server.")
_KEY = flags.DEFINE_string("api_key", None, "API key; default: the first key in $FAIRKV_API_KEY.")
_MODEL = flags.DEFINE_string("model", None, "Model name; default: the server's first one.")
_SYSTEM = flags.DEFINE_string("system", None, "System message at the start of the conversation.")
_SAMPLING = {
    "max_tokens": flags.DEFINE_integer("max_tokens", None, "Maximum tokens per answer."),
    "temperature": flags.DEFINE_float("temperature", None, "Sampling temperature; 0: greedy."),
    "top_p": flags.DEFINE_float(
        "top_p", None, "Cumulative probability of the most likely tokens to sample from."
    ),
    "top_k": flags.DEFINE_integer("top_k", None, "Number of most likely tokens to sample from."),
    "min_p": flags.DEFINE_float(
        "min_p", None, "Minimum probability, relative to the most likely token's."
    ),
    "seed": flags.DEFINE_integer("seed", None, "Random seed, which makes answers reproducible."),
    "kv_budget": flags.DEFINE_integer(
        "kv_budget", None, "Tokens kept per head on average, at most the server's budget."
    ),
}
_CA = flags.DEFINE_string("ssl_cafile", None, "PEM file of the certificate to trust, for HTTPS.")

HELP = "/reset starts a new conversation, /quit ends the program, Ctrl-C stops an answer"


@dataclass
class Talk:
    """A conversation with a server.

    Raises:
        OSError, http.client.HTTPException: the connection failed.
        ValueError: the server rejected the request; the message is the server's.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every request besides the messages."""
    system: str | None = None
    api_key: str | None = None
    ca_file: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yields the answer in pieces as they arrive.

        The question and the pieces that were consumed are added to the conversation, unless no
        piece arrived.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self._pieces():
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _pieces(self) -> Iterator[str]:
        body = {**self.options, "messages": self.messages, "stream": True}
        address = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
        connection = self._connect(address.scheme, address.netloc)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            path = address.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(_refusal(response.status, response.read()))
            for line in response:
                if line.startswith(b"data: {"):
                    yield _text(json.loads(line.removeprefix(b"data: ")))
        finally:
            connection.close()  # Aborts the request if it is still running.

    def _connect(self, scheme: str, host: str) -> http.client.HTTPConnection:
        if scheme == "https":
            context = ssl.create_default_context(cafile=self.ca_file)
            return http.client.HTTPSConnection(host, context=context)
        return http.client.HTTPConnection(host)


def _text(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise ValueError(chunk["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _refusal(status: int, body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server responded with status {status}: check that --base-url is correct"


def converse(talk: Talk) -> None:
    """Reads questions and prints answers until the input ends; a terminal also shows a prompt."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("\n> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if text == "/quit":
            break
        if text == "/reset":
            talk.reset()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            _answer(talk, text)


def _answer(talk: Talk, text: str) -> None:
    pieces = talk.ask(text)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]")
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"\n{talk.url}: {error}", file=sys.stderr)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options begin with --")
    with suppress(ImportError):
        import readline  # noqa: F401  (adds a history and line editing to input())
    given = {"model": _MODEL.value, **{name: flag.value for name, flag in _SAMPLING.items()}}
    talk = Talk(
        str(_URL.value),
        {name: value for name, value in given.items() if value is not None},
        _SYSTEM.value,
        _KEY.value or os.environ.get("FAIRKV_API_KEY", "").split(",")[0],
        _CA.value,
    )
    if sys.stdin.isatty():
        print(f"{talk.url}: {HELP}")
    converse(talk)


if __name__ == "__main__":
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
