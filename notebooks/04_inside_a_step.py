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
# # Inside a decode step
#
# One request, followed by hand through the arrays of the engine: slots, routes, lengths and pages.
# The idea to see is that *ownership is length*: a device that does not serve a request's head has
# length 0 there, and nothing else marks it.

# %%
# %matplotlib inline
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
# Compiled programs are kept on disk, so that the second run is fast.
for name, setting in (
    ("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/fairkv_jax")),
    ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
    ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1"),
):
    os.environ.setdefault(name, setting)

# %%
import numpy as np

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.engine.request import Request
from fairkv_jax.evaluate.haystack import read_haystack
from fairkv_jax.plan.route import route
from fairkv_jax.viz.devices import page_map, slot_map, waiting


def make_llm(devices):
    """The demo model on some devices, with two rows and a small cache."""
    return LLM(
        tensor_parallel_size=devices,
        kv_policy="ada_snapkv",
        kv_budget=64,
        page_size=16,
        max_model_len=512,
        max_num_seqs=2,
        kv_cache_memory_bytes=48 << 20,
        progress=False,
    )


llm = make_llm(2)
engine = llm.engine
sentences = read_haystack("python").sentences
prompts = {
    name: llm.get_tokenizer().encode(" ".join(sentences[start : start + 8]))
    for name, start in (("a", 0), ("b", 30))
}

# %% [markdown]
# ## Slots
#
# A layer has 3 KV heads, and there are 2 devices. The plan gives every device 2 *slots* per
# layer. That makes 4 slots, so in most layers one head is *copied*: both devices hold its weights.

# %%
layout = engine.plan.head_of_slot()  # [L, P, C]
replicas = engine.plan.replicas()  # [L, K, P]
copied = replicas.sum(2) > 1  # [L, K]
print("layers, devices, slots per device:", layout.shape)
print(f"{copied.sum()} heads are copied, in {copied.any(1).sum()} of {len(layout)} layers")
for layer in range(3):
    heads = "; ".join(f"device {p}: {' '.join(map(str, of))}" for p, of in enumerate(layout[layer]))
    print(f"layer {layer} holds heads  {heads}")

# %% [markdown]
# ## A request arrives
#
# `step()` schedules, executes, and processes the results. We step until request *a* has been read
# and compressed, and a few tokens have been generated. Then the same for request *b*.


# %%
def step_until(engine, request_id, count):
    """Steps until a request has generated at least `count` tokens."""
    while True:
        for output in engine.step():
            if output.request_id == request_id and len(output.outputs[0].token_ids) >= count:
                return output


def add(engine, name):
    """Gives a request to an engine, and steps until it decodes."""
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
    engine.add_request(Request(name, prompts[name], params))
    return step_until(engine, name, 2)


found = {name: add(engine, name) for name in prompts}
for name, output in found.items():
    kept = output.kv_lengths  # [L, K]
    print(
        f"request {name}: {len(prompts[name])} prompt tokens, of which a head keeps "
        f"{kept.mean():.0f} on average, {kept.min()} to {kept.max()}"
    )

# %% [markdown]
# ## Routing
#
# Which of the two replicas serves a copied head? When a request is inserted into the batch, its
# real lengths are known. Heads without a copy are placed first. Then each copied head goes to the
# device that holds less so far, in that layer. Request *a* came to an empty cache, so its route
# can be computed by hand:

# %%
kept = found["a"].kv_lengths
for layer in range(3):
    held = np.zeros(2, int)
    for head in np.flatnonzero(~copied[layer]):
        held[replicas[layer, head].argmax()] += kept[layer, head]
    (head,) = np.flatnonzero(copied[layer])
    print(
        f"layer {layer}: of other heads, the devices hold {held[0]} and {held[1]} tokens, so "
        f"head {head} with {kept[layer, head]} tokens goes to device {held.argmin()}"
    )
owner = route(replicas, kept, load=np.zeros(replicas.shape[::2], int))  # [L, K]

# %% [markdown]
# ## Ownership is length
#
# Here is the array `lengths` from the devices. It has an entry per layer, row of the batch, and
# slot. A copied head appears in two slots, and one of the two has length 0: it does not serve this
# row. (The lengths are the kept tokens and those that were generated since.)

# %%
devices, slots = layout.shape[1:]


def lengths_of(row):
    """The lengths of a row on the devices, [L, P, C]."""
    return np.asarray(engine.runner.cache.lengths)[:, row].reshape(layout.shape)


lengths = {name: lengths_of(row) for row, name in enumerate(prompts)}
slot_map(layout, lengths["a"], layers=5)

# %%
owned = {name: each > 0 for name, each in lengths.items()}
layer, device, slot = np.nonzero(owned["a"])
by_hand = owner[layer, layout[layer, device, slot]]
print("Each (layer, head) of row a has one owner:", len(layer) == owner.size)
print("It is the one that was computed by hand:", (by_hand == device).all())

# %% [markdown]
# Row *b* came when *a* was there already. A device that serves *a*'s copied head is fuller in that
# layer, so *b*'s usually goes to the other one:

# %%
is_copy = np.zeros(layout.shape, bool)
for layer, device, slot in np.argwhere(layout >= 0):
    is_copy[layer, device, slot] = copied[layer, layout[layer, device, slot]]
differ = (is_copy & owned["a"] & ~owned["b"]).sum()
slot_map(
    layout,
    lengths["b"],
    f"Row b uses the other replica in {differ} of {copied.sum()} layers with a copied head",
    layers=5,
)

# %% [markdown]
# ## Why length 0 is enough
#
# Attention over no tokens gives zeros. Tensor parallelism sums the outputs of all devices anyway,
# so the sum is the owner's output, and no mask is needed. To check this, we look up the pages of a
# copied head on both devices, and compute attention over them in NumPy, for a random query.


# %%
def cached(llm, layer, row, slot):
    """The keys and values [n, H] of a slot's part of a row, looked up in the pages."""
    cache, spec = llm.engine.runner.cache, llm.engine.runner.cache_spec
    count = int(np.asarray(cache.lengths)[layer, row, slot])
    device = slot // spec.slots_per_device
    first = np.asarray(cache.page_table.starts)[layer, row, slot]
    of_device = np.asarray(cache.page_table.pages).reshape(spec.num_devices, -1)[device]
    pages = of_device[first : first + -(-count // spec.page_size)]
    by_device = (spec.num_devices, spec.pages_per_device, spec.page_size, spec.head_dim)
    pools = (
        np.asarray(each).reshape(by_device) for each in (cache.pool.k_pages, cache.pool.v_pages)
    )
    return pages, *(pool[device, pages].reshape(-1, spec.head_dim)[:count] for pool in pools)


def attend(query, keys, values):
    """Attention of one query [H]; zeros where there is no token."""
    scores = keys @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max(initial=-np.inf))
    return weights @ values / max(weights.sum(), 1e-30)


layer = 1
(head,) = np.flatnonzero(copied[layer])
query = np.random.default_rng(0).normal(size=engine.runner.cache_spec.head_dim)
total = np.zeros_like(query)
for device, slot in np.argwhere(layout[layer] == head):
    pages, keys, values = cached(llm, layer, 0, device * slots + slot)
    out = attend(query, keys, values)
    total += out
    print(
        f"device {device}: {len(keys)} tokens of head {head}, in pages {pages.tolist()}; "
        f"|output| = {np.linalg.norm(out):.3f}"
    )
print(f"sum of both: |output| = {np.linalg.norm(total):.3f}")

# %% [markdown]
# ## Pages
#
# All layers, heads and rows of a device take their pages from one pool, so a head that keeps more
# simply has more pages. A page holds 16 tokens. The picture shows the pages of both devices in the
# order of their numbers, and marks the heads of one layer.

# %%
manager = engine.scheduler.kv_cache
held = manager.lengths  # [L, B, P*C]
pages = np.full((devices, engine.runner.cache_spec.pages_per_device), -1)  # their owners
marked = int((kept.max(1) / kept.min(1))[:4].argmax())
names = ["row a", "row b"]
for layer, row, slot in np.argwhere(held):
    owner = row
    if (layer, row) == (marked, 0):
        owner = len(names)
        names.append(
            f"row a, layer {layer}, head {layout[layer].ravel()[slot]}: "
            f"{held[layer, row, slot]} tokens"
        )
    pages[slot // slots, manager.pages_of(layer, row, slot)] = owner
used = (pages >= 0).sum(1)
page_map(
    pages[:, : used.max() + 16],
    names,
    f"The devices hold {used[0]} and {used[1]} pages: the load is balanced",
)

# %% [markdown]
# A prompt's pages are taken at once, layer by layer. Later, whenever a head's last page is full,
# the next free page follows, so the heads' newer pages lie among those of others.
#
# When the requests end, all pages are free again:

# %%
for name in prompts:
    engine.abort_request(name)
engine.step()
print("pages in use:", manager.used_pages)

# %% [markdown]
# ## The same tokens on 1 and 3 devices
#
# Every head's attention is computed once, by its owner, whoever that is. So the number of devices
# changes where the cache lies, and not what is generated.

# %%
llms = {1: make_llm(1), 2: llm, 3: make_llm(3)}
loads, heads, tokens = {}, {}, {}
for count, each in llms.items():
    for name in prompts:
        add(each.engine, name)
    plan = each.engine.plan
    by_slot = np.asarray(each.engine.runner.cache.lengths).sum(1)  # [L, P*C]
    loads[f"{count} device{'s' * (count > 1)}"] = by_slot.reshape(plan.num_layers, count, -1).sum(2)
    of_row = np.asarray(each.engine.runner.cache.lengths)[marked, 0]  # [P*C]
    (slot,) = np.flatnonzero((plan.head_of_slot()[marked].ravel() == 0) & (of_row > 0))
    heads[count] = cached(each, marked, 0, slot)[1][: kept[marked, 0]]
    tokens[count] = step_until(each.engine, "b", 40).outputs[0].token_ids[:40]
    for name in prompts:
        each.engine.abort_request(name)
same = tokens[1] == tokens[2] == tokens[3]
waiting(loads, f"{'The same' if same else 'Different'} 40 tokens, from 1, 2 and 3 devices")

# %%
print(f"In layer {marked}, head 0 keeps the same {kept[marked, 0]} keys, up to rounding:")
for count in (2, 3):
    difference = np.abs(heads[count] - heads[1]).max()
    copies = llms[count].engine.plan.num_extra_replicas
    print(f"on {count} devices ({copies} copies) they differ by at most {difference:.0e} from 1")
print("Request b:", repr(llm.get_tokenizer().decode(tokens[1])))
assert same

# %% [markdown]
# How copies change what devices wait for, and what they cost, is the subject of
# [02_plan](02_plan.ipynb).
