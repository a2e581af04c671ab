# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A server, streaming, and a document that is asked ten times
#
# This notebook starts the OpenAI-compatible server in the background, streams an answer, caches a
# document once, asks it ten questions at the same time, and plots the server's own metrics.

# %%
# %matplotlib inline
import atexit
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
from openai import OpenAI

from fairkv_jax.evaluate.haystack import read_haystack
from fairkv_jax.viz.curves import Curve, bars, curves, timeline

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/fairkv_jax"))
options = (
    *("--kv-policy", "duo_attention", "--kv-ratio", "0.8", "--tensor-parallel-size", "2"),
    *("--enable-prefix-caching", "--max-model-len", "1024", "--max-num-seqs", "10"),
    *("--kv-cache-memory-bytes", str(128 << 20)),
)
own = ("--port", str(port), "--compilation-cache-dir", cache)
server = subprocess.Popen(
    [sys.executable, "-m", "fairkv_jax.serve", *options, *own],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
atexit.register(server.terminate)  # also if a cell fails
http = httpx.Client(base_url=url, timeout=600)
print("python -m fairkv_jax.serve", *options)


def is_ready():
    """Whether the server has compiled everything; until then /ready answers 503."""
    try:
        return http.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


while not is_ready():
    assert server.poll() is None, "the server ended"
    time.sleep(0.2)
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
print("ready:", model)

# %% [markdown]
# ## Streaming
#
# Tokens come as they are made, so that one can read along.

# %%
began, text, times = time.perf_counter(), "", []
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_tokens=32,
    temperature=0,
    stream=True,
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        text += chunk.choices[0].delta.content
        times.append(time.perf_counter() - began)
print(text)
curves(
    {"": {"tokens": Curve(np.array(times), np.arange(1, len(times) + 1))}},
    f"The first token came after {times[0]:.2f} s, the last after {times[-1]:.2f} s",
    x_label="seconds",
    y_label="tokens received",
    markers=False,
)

# %% [markdown]
# ## Metrics, sampled in the background
#
# `/metrics` speaks Prometheus, under vLLM's names; what vLLM does not have begins with `fairkv:`.
# From here on, a thread reads it ten times a second.

# %%
samples = []
sampling = threading.Event()


def value(text, name, **labels):
    """The sum of a metric's samples that have these labels."""
    wanted = [f'{key}="{label}"' for key, label in labels.items()]
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in wanted)
    )


def sample():
    """Reads the metrics until the event is set."""
    while not sampling.wait(0.1):
        text = http.get("/metrics").text
        samples.append(
            (
                time.perf_counter(),
                value(text, "vllm:num_requests_running"),
                value(text, "vllm:num_requests_waiting"),
                value(text, "vllm:generation_tokens_total"),
                value(text, "vllm:kv_cache_usage_perc"),
            )
        )


sampler = threading.Thread(target=sample)
sampler.start()

# %% [markdown]
# ## A document, cached once
#
# The document is read and compressed to a fifth, before any question is known. `duo_attention` is
# made for that: see [03_what_is_kept](03_what_is_kept.ipynb).

# %%
FACTS = {
    "The meeting with Anna takes place in room": "214",
    "The train to Geneva leaves from platform": "37",
    "The invoice for the blue chairs is number": "8306",
    "The code of the bicycle lock is": "5914",
    "The wedding of Peter and Maria is in the month of": "October",
    "The neighbour's black cat is called": "Oscar",
    "The spare key lies under the": "flowerpot",
    "The best cake in town is made with": "almonds",
    "The name of the new manager is": "Victoria",
    "The museum near the river opens at": "10",
}
sentences = list(read_haystack("python").sentences[:20])
for index, (fact, answer) in enumerate(FACTS.items()):
    sentences.insert(1 + 3 * index, f"{fact} {answer}.")
document = " ".join(sentences)
began = time.perf_counter()
prefix = http.post("/v1/prefixes", json={"prompt": document}).json()
print(f"cached in {time.perf_counter() - began:.1f} s, as {prefix['id'][:12]}...")
print(
    f"{prefix['num_tokens']} tokens, of which a head keeps {prefix['kept_tokens']} on average, "
    f"in {prefix['bytes'] / 2**20:.1f} MiB"
)

# %% [markdown]
# ## ... and asked ten times
#
# Each question brings only its own tokens. All requests share the pages of the document.

# %%
ASK = "\n\nQuestion: complete the sentence from the text above.\nAnswer: "
answers = {}


def ask(fact):
    """Asks the cached document for one fact."""
    answers[fact] = client.completions.create(
        model=model,
        prompt=ASK + fact,
        max_tokens=32,
        temperature=0,
        extra_body={"prefix_id": prefix["id"], "ignore_eos": True},
    )


threads = [threading.Thread(target=ask, args=(fact,)) for fact in FACTS]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for fact, answer in FACTS.items():
    said = answers[fact].choices[0].text.strip().split("\n")[0]
    print("right" if answer in said else "WRONG", f" {fact} {said[:32]}")
usage = answers[fact].usage
print(
    f"The last question had {usage.prompt_tokens} prompt tokens, "
    f"{usage.prompt_tokens_details.cached_tokens} of which were cached already."
)

# %% [markdown]
# ## What the server saw
#
# First the document was read. Then ten requests came at once: each waits until its question is
# read, between the steps of those that run already.

# %%
time.sleep(0.5)
sampling.set()
sampler.join()
clock, running, waiting, generated, usage = (np.array(column) for column in zip(*samples))
rates = np.diff(generated, prepend=generated[0]) / np.diff(clock, prepend=clock[0] - 0.1)
timeline(
    clock - clock[0],
    {
        "requests": {"running": running, "waiting": waiting},
        "generated tokens/s": {"tokens/s": rates},
        "cache in use on the fullest device, in %": {"cache": 100 * usage},
    },
    f"The document takes {usage[-1]:.1%} of the cache; while up to {running.max():.0f} requests "
    f"read it, at most {usage.max():.1%} is in use",
)

# %% [markdown]
# At the end the document is still there. It stays until its pages are needed, or until it is
# deleted.

# %% [markdown]
# ## What does the cached document save?
#
# The same question, with the whole prompt and with the cached document. (The times of this page
# were measured on two CPU cores that had other work to do.)


# %%
def first_token(prompt, **extra):
    """Seconds until an answer's first token."""
    began = time.perf_counter()
    client.completions.create(
        model=model, prompt=prompt, max_tokens=1, temperature=0, extra_body=extra
    )
    return time.perf_counter() - began


whole = first_token(document + ASK + fact)
cached = first_token(ASK + fact, prefix_id=prefix["id"])
bars(
    {"whole prompt": round(whole, 2), "cached document": round(cached, 2)},
    f"With the document cached, the first token comes {whole / cached:.0f} times as soon",
    y_label="seconds to the first token",
)

# %% [markdown]
# While the server runs, it has a live page at `/`. It stops like any other process:

# %%
http.delete(f"/v1/prefixes/{prefix['id']}").raise_for_status()
server.terminate()
print("exit status:", server.wait(30))
