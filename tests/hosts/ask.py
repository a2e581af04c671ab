"""Clients of a server: `python -m tests.hosts.ask URL NUMBER` streams that many answers at once.

It prints a line of JSON when the first token has come, and one for the end of each answer. When all
have ended, it prints the status of /health, or that the server is gone.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx

BODY = {"prompt": "one two three", "max_tokens": 100, "ignore_eos": True, "stream": True}


def ask(url: str, number: int) -> dict[str, Any]:
    """Streams an answer, and returns how it ended."""
    last = ""
    body = {**BODY, "seed": number}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
            if response.status_code != 200:
                return {"status": response.status_code}
            for line in response.iter_lines():
                if line.startswith("data: "):
                    if not last:
                        print(json.dumps({"first": number}), flush=True)
                    last = line.removeprefix("data: ")
    except httpx.HTTPError as error:
        return {"broken": repr(error)}
    return {"last": last}


def main() -> None:
    url, count = sys.argv[1], int(sys.argv[2])
    with ThreadPoolExecutor(count) as pool:
        for ended in pool.map(partial(ask, url), range(count)):
            print(json.dumps(ended), flush=True)
    try:
        status = httpx.get(f"{url}/health", timeout=10).status_code
        print(json.dumps({"health": status}), flush=True)
    except httpx.HTTPError as error:
        print(json.dumps({"gone": repr(error)}), flush=True)


if __name__ == "__main__":
    main()
