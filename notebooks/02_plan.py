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
# # A plan: which device holds which heads, and which it copies
#
# A *profile* says how many tokens every head keeps. A *plan* assigns the heads of each layer to
# devices, so that no device waits long for another. This notebook makes plans for published
# profiles, and shows when copying a head pays and when it does not. It needs neither a model nor
# JAX.

# %%
# %matplotlib inline
import json
from pathlib import Path

import numpy as np

from fairkv_jax.plan import CostModel, Profile, find_shape, make_plan
from fairkv_jax.viz.curves import Curve, curves
from fairkv_jax.viz.devices import layer_packing, waiting
from fairkv_jax.viz.heads import head_maps

results = Path("../benchmarks/results")
published = json.loads((results / "balance.json").read_text(encoding="utf-8"))


def mean_kept(model, scorer):
    """Mean kept tokens [L, K] of a published profile (TANGRAM, Apache-2.0)."""
    return np.array(published["mean_kept"][f"{model}, {scorer}"], float)


# %% [markdown]
# ## One layer on four devices
#
# Every block is a head; its height is what the head keeps of one row (one request). Standard
# tensor parallelism (`static`) puts heads 0 and 1 on device 0, and so on. `best_effort` chooses
# which heads share a device. That cannot help where a single head is heavier than a device's
# share. `fair_copying` copies such a head to several devices (hatched): each copy serves a part
# of the rows, so over the whole batch a device holds that part of the head's tokens.

# %%
kept = mean_kept("Llama-3.1-8B", "fastkvzip")
kept *= 2048 / kept.mean()
llama = Profile(
    model="Llama-3.1-8B",
    policy="fastkvzip",
    budget=2048,
    tokens=kept.tolist(),
    shape=find_shape("llama-3.1-8b"),
)
cost = CostModel.of(llama.shape, 4, "H100", batch=64)
strategies = {
    "static": ("static", "equal"),
    "best effort": ("best_effort", "equal"),
    "fair copying": ("fair_copying", "proportional"),
}
plans = {
    name: make_plan(llama, 4, kind, row_split=split, cost=cost, effort=0)
    for name, (kind, split) in strategies.items()
}
layer = int((kept.max(1) / kept.mean(1)).argmax())
layer_packing({name: plan.shares()[layer] for name, plan in plans.items()}, kept[layer])

# %% [markdown]
# Over all 32 layers, that is the difference between waiting a third of the time and not waiting:

# %%
waiting({name: plan.loads(llama.array) for name, plan in plans.items()})

# %% [markdown]
# ## A copy is not free
#
# A device reads the weights of each of its heads in every step, whoever uses them. So a copy
# costs the time of one head's weights, in every layer, as all layers have the same number of
# *slots*. For this model, that is as long as reading

# %%
slot_tokens = cost.a_seconds / cost.b_seconds_per_token
print(f"{slot_tokens:,.0f} cached tokens: {slot_tokens / 64:,.0f} of each row at a batch of 64,")
print(f"and {slot_tokens / 16:,.0f} of each row at a batch of 16.")

# %% [markdown]
# Drag the price of a copy, in tokens per row, for eight layers of this profile on 4 devices.
# Where copies are cheap, the planner makes many. Where they are dear, it falls back to whole
# heads.

# %%
start = max(0, min(layer - 4, 24))
eight = Profile(model="", policy="", budget=2048, tokens=kept[start : start + 8].tolist())


def plans_at(price):
    """Plans of the eight layers if a head's weights take as long as `price` tokens of a row."""
    model = CostModel(a_seconds=price, b_seconds_per_token=1.0, batch=1)
    return {
        name: make_plan(eight, 4, kind, row_split=split, cost=model, effort=0)
        for name, (kind, split) in strategies.items()
    }


def draw(price):
    """Draws the plans of the layer whose heads differ the most."""
    found = plans_at(price)
    fair = found["fair copying"]
    speed = found["static"].step_seconds / fair.step_seconds
    title = (
        f"A copy costs {price:,.0f} tokens: {fair.num_extra_replicas} copies, {speed:.2f}x static"
    )
    packings = {name: plan.shares()[layer - start] for name, plan in found.items()}
    return layer_packing(packings, kept[layer], title)


draw(128)

# %%
import ipywidgets

slider = ipywidgets.FloatLogSlider(value=2048, base=2, min=5, max=12, step=1, description="tokens")
_ = ipywidgets.interact(lambda price: display(draw(price)), price=slider)

# %% [markdown]
# Without a running kernel the slider does not move, so here is the whole range at once:

# %%
prices = 2.0 ** np.arange(5, 13)
found = [plans_at(price) for price in prices]
speeds = {
    name: Curve(
        prices, np.array([each["static"].step_seconds / each[name].step_seconds for each in found])
    )
    for name in ("best effort", "fair copying")
}
copies = [each["fair copying"].num_extra_replicas for each in found]
stops = next((price for price, count in zip(prices, copies) if not count), None)
title = "Copies pay at all these prices"
if stops is not None:
    title = f"Copies stop paying when one costs {stops:,.0f} tokens of a row"
curves(
    {"Eight layers, 8 heads, 4 devices": speeds},
    title,
    log_x=2,
    reference=(1.0, "static"),
    x_label="price of a copy, in tokens per row",
    y_label="speed of attention / static",
)

# %% [markdown]
# ## Published profiles
#
# Profiles of four models with four scorers. The stronger the scorer, the darker single cells: it
# has found that a few heads need many tokens, and the others few.

# %%
SCORERS = {
    "SnapKV": "snapkv",
    "KeyDiff": "keydiff",
    "Expected Attention": "ea",
    "FastKVzip": "fastkvzip",
}
head_maps({name: mean_kept("Llama-3.1-8B", scorer) for name, scorer in SCORERS.items()})

# %%
head_maps(
    {model: mean_kept(model, "fastkvzip") for model in ("Qwen3-4B", "Gemma-3-12B", "gpt-oss-20b")}
)

# %% [markdown]
# Gemma-3 and gpt-oss compress only the layers without a sliding window, so their maps are short,
# and whole steps gain less: the other layers wait for nobody. The gain depends on the batch
# *times* the tokens kept per head. Whole decode steps on 8 H100s, by the cost model, relative to
# `static`:

# %%
tokens = np.outer(published["batches"], published["kept"])
products = np.unique(tokens)
panels = {}
for record in published["records"]:
    if record["devices"] == 8 and record["scorer"] in SCORERS.values():
        ratios = np.array(record["equal_batch"]["fair copying"]["step_ratio"])
        speeds = np.array([ratios[tokens == product].max() for product in products])
        scorer = next(name for name, key in SCORERS.items() if key == record["scorer"])
        panels.setdefault(record["model"], {})[scorer] = Curve(products, speeds)
at = list(products).index(64 * 2048)
gains = {name: line.y[at] for name, line in panels["Llama-3.1-8B"].items()}
curves(
    panels,
    f"Llama-3.1-8B, 64 rows of 2,048 kept tokens: {gains['SnapKV']:.2f}x with SnapKV, "
    f"{gains['FastKVzip']:.2f}x with FastKVzip",
    x_label="batch x tokens kept per head",
    y_label="tokens/s / static",
    log_x=2,
    reference=(1.0, "static"),
    columns=2,
)

# %% [markdown]
# [The page of all results](../benchmarks/results/balance.html) answers for a model, a batch and a
# budget. For your own model:
#
#     python -m fairkv_jax.profile --model MODEL --prompts prompts.jsonl --output profile.json
#     python -m fairkv_jax.plan --profile profile.json --devices 8 --output plan.json
#     python -m fairkv_jax.serve --model MODEL --head-plan plan.json
