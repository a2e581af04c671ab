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
# # Heads keep different numbers of tokens, and devices wait for it
#
# A long prompt's KV cache can be compressed: every attention head keeps only the tokens that
# matter to it. Methods that let heads keep different numbers of tokens lose the least quality.
# This notebook measures, on real prompts, how different heads are, and what that means for a
# model that is split over several devices.

# %%
# %matplotlib inline
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
# Compiled programs are kept on disk, so that the second run is fast.
for name, setting in (
    ("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/fairkv_jax")),
    ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
    ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1"),
):
    os.environ.setdefault(name, setting)

# %% [markdown]
# ## Twelve prompts through the demo model
#
# SmolLM2-135M-Instruct has 30 layers with 3 KV heads. It runs on two devices (here, halves of a
# CPU). `ada_snapkv` keeps 128 tokens per head *on average*, and decides in every layer which head
# gets how many. The prompts are 12 passages of 500 tokens of Python's language reference.

# %%
import numpy as np

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.evaluate.haystack import read_haystack

llm = LLM(
    tensor_parallel_size=2,
    kv_policy="ada_snapkv",
    kv_budget=128,
    max_model_len=1024,
    progress=False,
)
sentences = read_haystack("python").sentences
tokens = llm.get_tokenizer().encode(" ".join(sentences))
prompts = [tokens[500 * i : 500 * (i + 1)] for i in range(12)]
outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0))
kept = np.array([output.kv_lengths for output in outputs])
print("tokens kept, [prompts, layers, heads]:", kept.shape)
print(f"mean {kept.mean():.0f}, smallest {kept.min()}, largest {kept.max()}")

# %% [markdown]
# ## Which heads keep what
#
# Left: one prompt. Right: the mean of all twelve. The maps look alike: a head that keeps much of
# one prompt keeps much of the others. That is why a *profile*, measured once, can be used to
# plan.

# %%
from fairkv_jax.plan import Profile
from fairkv_jax.viz.heads import head_maps, lorenz

profile = Profile.from_samples(kept, model=llm.engine.model_name, policy="ada_snapkv", budget=128)
print(f"correlation of two prompts, on average: {profile.correlation:.2f}")
head_maps({"one prompt": kept[0], "mean of 12": profile.array})

# %% [markdown]
# The Lorenz curve orders the heads by what they keep. On the dashed line, all would keep the
# same. The other curves are published profiles of Llama-3.1-8B (28 prompts of 14,000 to 26,000
# tokens; from TANGRAM, Apache-2.0): the better a scorer tells heads apart, the more unequal they
# are.

# %%
import json
from pathlib import Path

results = Path("../benchmarks/results")
published = json.loads((results / "balance.json").read_text(encoding="utf-8"))
llama = {
    name: np.array(published["mean_kept"][f"Llama-3.1-8B, {scorer}"])
    for name, scorer in (("SnapKV", "snapkv"), ("FastKVzip", "fastkvzip"))
}
lorenz(
    {"SmolLM2, ada_snapkv": profile.array}
    | {f"Llama-3.1-8B, {name}": each for name, each in llama.items()}
)

# %% [markdown]
# ## What every step waits for
#
# Standard tensor parallelism gives each device a block of heads. A decode step goes through the
# layers one by one, and a layer is finished when its fullest device is. The hatched part of a bar
# is the time in which a device has nothing to do. Llama-3.1-8B has 8 KV heads: with 8 devices,
# each holds one.

# %%
from fairkv_jax.plan import CostModel, make_plan
from fairkv_jax.viz.devices import waiting


def static_loads(tokens, devices):
    """Cached tokens of one row [L, P] with heads in contiguous blocks."""
    plain = Profile(model="", policy="", budget=None, tokens=tokens.tolist())
    cost = CostModel.tokens_only(batch=1)
    return make_plan(plain, devices, "static", cost=cost).loads(plain.array)


waiting({f"{devices} devices": static_loads(llama["FastKVzip"], devices) for devices in (2, 4, 8)})

# %% [markdown]
# The same for the demo model and its 3 heads. On 2 devices one holds two heads; on 4, one device
# holds no head at all. Heads that do not divide over the devices make it worse.

# %%
waiting({f"{devices} devices": static_loads(profile.array, devices) for devices in (2, 3, 4)})

# %% [markdown]
# ## And with a plan?
#
# `best_effort` assigns whole heads by what they keep. `fair_copying` also puts copies of heavy
# heads on several devices, each of which serves a part of the batch. [02_plan](02_plan.ipynb)
# shows how, and what a copy costs.

# %%
plans = {
    "static": make_plan(profile, 2, "static"),
    "best effort": make_plan(profile, 2, "best_effort"),
    "fair copying": make_plan(profile, 2, "fair_copying", row_split="proportional"),
}
waiting({name: plan.loads(profile.array) for name, plan in plans.items()})
