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
# # Which tokens survive, and does the needle?
#
# A document is compressed to a fifth. Which of its tokens remain in the cache depends on the
# method, and on whether the method has seen the question. This notebook colours a document by
# what is kept, looks for a number that is hidden in it, and asks the model for the number.

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
# ## A document with a needle
#
# The *needle* is a sentence that has nothing to do with the others, which are from Python's
# language reference. The engine can also cache prefixes, which is needed at the end.

# %%
import numpy as np
from IPython.display import HTML

from fairkv_jax import LLM, SamplingParams
from fairkv_jax.evaluate.haystack import read_haystack
from fairkv_jax.viz.curves import bars
from fairkv_jax.viz.heads import head_maps
from fairkv_jax.viz.tokens import kept_fraction, kept_positions, kept_text

NEEDLE = "The secret number for Clara is 417."
ASK = "\n\nQuestion: complete the sentence from the text above.\nAnswer: "
QUESTION = ASK + NEEDLE.removesuffix(" 417.")
sentences = list(read_haystack("python").sentences[40:72])
sentences.insert(12, NEEDLE)
document = " ".join(sentences)

llm = LLM(
    tensor_parallel_size=2,
    kv_policy="duo_attention",
    kv_ratio=0.8,
    max_model_len=1024,
    max_num_seqs=4,
    enable_prefix_caching=True,
    progress=False,
)
tokenizer = llm.get_tokenizer()
ids = tokenizer.encode(document)
pieces = [tokenizer.decode([token]) for token in ids]
ends = np.cumsum([len(piece) for piece in pieces])
start, stop = (
    int(np.searchsorted(ends, document.index(NEEDLE) + at, side="right"))
    for at in (0, len(NEEDLE) - 1)
)
number = [i for i in range(start, stop + 1) if pieces[i].strip().isdigit()]
print(f"The document has {len(ids)} tokens. The needle is tokens {start} to {stop}:")
print(" | ".join(pieces[start : stop + 1]))

# %% [markdown]
# ## With the question in view, and without
#
# *In view*: the document and the question are one prompt, and compressed together. *Unseen*: the
# document is compressed alone, as a cached document is that will be asked many times. The methods:
#
# - `streaming_llm` keeps the first and the last tokens, whatever they are.
# - `snapkv` keeps the last 32 tokens, and what these attend to.
# - `ada_snapkv` does the same, but lets the heads of a layer keep different numbers of tokens.
# - `duo_attention` keeps everything in a few heads, and the first and the last tokens in the
#   others.

# %%
METHODS = ("streaming_llm", "snapkv", "ada_snapkv", "duo_attention")
VIEWS = {"in view": document + QUESTION, "unseen": document}
greedy = SamplingParams(temperature=0, max_tokens=8)


def policy(method):
    """The option that asks for a method; None is the engine's own."""
    return None if method == "duo_attention" else method


results = {}
for method in METHODS:
    for view, prompt in VIEWS.items():
        (results[method, view],) = llm.generate(
            prompt, greedy, kv_policy=policy(method), return_kept_positions=True
        )
kept = {
    f"{method}, {view}": kept_fraction(output.kept_positions, len(output.prompt_token_ids))
    for (method, view), output in results.items()
}
seen, blind = (kept[f"ada_snapkv, {view}"][number].mean() for view in VIEWS)
kept_positions(
    {name: each[: len(ids)] for name, each in kept.items()},
    {"needle": (start, stop)},
    f"ada_snapkv keeps the number in {seen:.0%} of the heads if it sees the question, "
    f"in {blind:.0%} if not",
    bins=96,
)

# %% [markdown]
# Closer: the text around the needle. The darker a token, the more heads keep it. With `snapkv` and
# `ada_snapkv`, the needle stands out where the question was in view; where it was not, they prefer
# other words. `streaming_llm` and `duo_attention` do not look at the question: the first drops
# all of these words, and the second treats them alike, since a few heads keep every one of them.

# %%
window = slice(max(0, start - 40), stop + 41)
HTML("".join(kept_text(pieces[window], each[window], name) for name, each in kept.items()))

# %% [markdown]
# ## How many heads keep the number?
#
# By this count, where the question is unseen, `duo_attention` looks no better than `ada_snapkv`.

# %%
survival = {name: each[number].mean() for name, each in kept.items()}
bars(
    survival,
    f"The number survives in {min(survival.values()):.0%} to {max(survival.values()):.0%} "
    "of the heads",
    y_label="heads that keep the number",
    percent=True,
)

# %% [markdown]
# ## Which heads?
#
# Not all heads look facts up. *Head scores* say how much a head does. `python -m
# fairkv_jax.profile learn` has learned these from the model: they belong to it, and not to a
# prompt. Beside them: the heads that kept the number, where the question was unseen.

# %%
from fairkv_jax.plan import shipped_head_scores

scores = shipped_head_scores(llm.engine.model_name).array  # [L, K]


def keeps_number(method, view):
    """The fraction of the number's tokens that each head keeps, [L, K]."""
    positions = results[method, view].kept_positions
    return np.array([[np.isin(number, head).mean() for head in layer] for layer in positions])


unseen = {name: keeps_number(name, "unseen") for name in ("duo_attention", "ada_snapkv")}
top = scores >= np.sort(scores.ravel())[-scores.size // 10]
duo, ada = (int((each[top] == 1).sum()) for each in unseen.values())
head_maps(
    {"head scores": scores} | unseen,
    f"Of the {top.sum()} heads with the highest scores, {duo} keep the number with duo_attention, "
    f"{ada} with ada_snapkv",
    label="score, or tokens of the number, / mean",
)

# %% [markdown]
# So count again, and let each head count as much as its score. `duo_attention` keeps the number
# in few heads, but in those that look facts up.

# %%
weighted = {
    f"{method}, {view}": (keeps_number(method, view) * scores).sum() / scores.sum()
    for method, view in results
}
duo, ada = (weighted[f"{method}, unseen"] for method in ("duo_attention", "ada_snapkv"))
bars(
    weighted,
    f"Question unseen: the heads that keep the number have {duo:.0%} of all scores with "
    f"duo_attention, {ada:.0%} with ada_snapkv",
    y_label="scores of the heads that keep the number",
    percent=True,
)

# %% [markdown]
# ## Does the model still know the number?
#
# In view, the answer is what followed the prompt above. Unseen, the document is cached once, and
# then asked.

# %%
print(f"{'method':14} {'question in view':28} question after compression")
for method in METHODS:
    prefix = llm.cache_prefix(document, kv_policy=policy(method), require_query_agnostic=False)
    (after,) = llm.generate(QUESTION, greedy, prefix_id=prefix.id)
    cells = []
    for output in (results[method, "in view"], after):
        text = output.outputs[0].text.strip().split("\n")[0]
        cells.append(f"{text!r} {'right' if '417' in text else 'WRONG'}")
    print(f"{method:14} {cells[0]:28} {cells[1]}")

# %% [markdown]
# One document proves little. [05_quality](05_quality.ipynb) asks many, with intervals.
