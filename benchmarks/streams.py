"""A client that streams completions and records the arrival time of every token."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np


@dataclass
class Answer:
    """One streamed completion. Times are in seconds of `time.perf_counter`."""

    prompt_tokens: int
    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Pairs of an arrival time and the number of tokens that arrived."""
    ended: float = 0.0
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0][0] - self.sent

    @property
    def latency(self) -> float:
        return self.ended - self.sent

    def intervals(self, since: float = 0.0, until: float = np.inf) -> list[float]:
        """Returns the inter-token latencies of all gaps that overlap with the time span.

        Tokens that arrive together share the gap before them equally.
        """
        found = []
        for (before, _), (now, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            if now >= since and before <= until:
                found += [(now - before) / count] * count
        return found


async def stream(client: httpx.AsyncClient, answer: Answer, body: dict[str, Any]) -> Answer:
    """Requests a streamed completion and records its tokens in `answer`."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**body, "stream": True, "stream_options": options}
    answer.sent = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code} {(await response.aread()).decode()[:200]}"
                return answer
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _note(answer, json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__} {error}"
    answer.ended = time.perf_counter()
    if answer.error is None and not answer.arrivals:
        answer.error = "the response contained no token"
    return answer


def _note(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = chunk["error"]["message"]
        return
    usage = chunk.get("usage") or {}
    new = usage.get("completion_tokens", answer.output_tokens + 1) - answer.output_tokens
    if new > 0:
        answer.arrivals.append((time.perf_counter(), new))


def headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def vocabulary(url: str, api_key: str | None) -> range:
    """Returns the range of token ids for random prompts, which contains no special tokens."""
    info = httpx.get(f"{url}/tokenizer_info", headers=headers(api_key), timeout=60)
    info.raise_for_status()
    size = info.json()["vocab_size"]
    return range(size // 4, size // 2)


def random_prompt(chance: np.random.Generator, ids: range, length: int) -> list[int]:
    return chance.integers(ids.start, ids.stop, length).tolist()


def summary_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the mean, percentiles and maximum in milliseconds."""
    if not seconds:
        return {}
    values = 1e3 * np.array(seconds)
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 95, 99)}
    return {"mean": float(values.mean()), **percentiles, "max": float(values.max())}
