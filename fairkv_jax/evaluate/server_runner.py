"""Runs the questions of a sweep against a running server, over its HTTP interface."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from fairkv_jax.evaluate.documents import Document, Question
from fairkv_jax.evaluate.results import FULL
from fairkv_jax.evaluate.runners import Answer, NotServed

_CONCURRENCY = 8
_TIMEOUT_S = 600.0


class ServerRunner:
    """A server that runs a method at the ratios that requests name.

    Raises:
        ValueError: the server does not answer, or refuses what it is asked.
    """

    def __init__(self, base_url: str, method: str, *, api_key: str | None = None):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url, self._method = base_url.rstrip("/").removesuffix("/v1"), method
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT_S)
        self._pool = ThreadPoolExecutor(_CONCURRENCY)

    def __enter__(self) -> "ServerRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._client.close()

    def count_tokens(self, text: str) -> int:
        return int(self._post("/tokenize", {"prompt": text})["count"])

    def answer_in_view(
        self, documents: Sequence[Document], ratio: float | None, max_tokens: int
    ) -> list[list[Answer]]:
        prompts = [
            document.text + each.text for document in documents for each in document.questions
        ]

        def ask(prompt: str) -> Answer:
            options = {} if ratio is None else {"kv_budget": self._budget(prompt, ratio)}
            body = self._completion(prompt, max_tokens)
            answer = self._post("/v1/completions", {**body, "kv_policy": self._policy, **options})
            usage = answer["usage"]
            kept = usage["kept_prompt_tokens"] / usage["prompt_tokens"]
            self._check_full(kept)
            return Answer(answer["choices"][0]["text"], kept)

        answers = iter(list(self._pool.map(ask, prompts)))
        return [[next(answers) for _ in document.questions] for document in documents]

    def answer_after(
        self, document: Document, ratio: float | None, max_tokens: int
    ) -> list[Answer]:
        body = {"prompt": document.text, "kv_policy": self._policy, "kv_ratio": ratio}
        prefix = self._post("/v1/prefixes", body)
        kept = prefix["kept_tokens"] / prefix["num_tokens"]

        def ask(question: Question) -> Answer:
            body = self._completion(question.text, max_tokens)
            answer = self._post("/v1/completions", {**body, "prefix_id": prefix["id"]})
            return Answer(answer["choices"][0]["text"], kept)

        try:
            self._check_full(kept)
            return list(self._pool.map(ask, document.questions))
        finally:
            self._client.delete(f"/v1/prefixes/{prefix['id']}")

    def _check_full(self, kept: float) -> None:
        if self._method == FULL and kept < 1:
            raise ValueError(
                f"{self._url} keeps only {kept:.0%} of a prompt, so there is no full cache to "
                "compare with: start the server with --kv-policy full"
            )

    @property
    def _policy(self) -> str | None:
        """The policy to ask for; None for full, which must be the server's own."""
        return None if self._method == FULL else self._method

    def _budget(self, prompt: str, ratio: float) -> int:
        """Returns the tokens that a ratio keeps: completions take budgets only."""
        return max(1, int(self.count_tokens(prompt) * (1 - ratio)))

    def _completion(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Posts a request.

        Raises:
            NotServed: the server refuses this method or protocol.
            ValueError: the server cannot be reached, or refuses the request otherwise.
        """
        try:
            response = self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(
                f"--base-url {self._url} does not answer ({type(error).__name__}: {error}): is the "
                "server running?"
            ) from error
        if response.status_code == 200:
            return response.json()
        message = _message(response)
        if any(word in message for word in ("kv_policy", "kv_budget", "kv_ratio", "prefixes")):
            raise NotServed(message)
        raise ValueError(f"{self._url}{path} answered {response.status_code}: {message}")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
