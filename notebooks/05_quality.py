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
# # What does compression cost, and which budget is enough?
#
# Compression loses information. How much that matters depends on the model, the task and the
# text, so it must be measured. This notebook draws an evaluation of the demo model, and then finds
# a budget for a text of one's own.

# %% [markdown]
# ## An evaluation, drawn
#
# The demo model was asked for numbers that are hidden in 1,000 tokens. Every answer is a line of
# [quality.jsonl](../benchmarks/results/quality.jsonl), which was written by
#
#     python -m fairkv_jax.evaluate --methods duo_attention,ada_snapkv --ratios 0.8,0.9 ...
#
# It also has lines of other runs. As in [docs/quality.md](../docs/quality.md), the first 10
# documents of each task and these two methods are drawn.
#
# A question was asked in one of two ways. *In view*: document and question are one prompt, and are
# compressed together. *After compression*: the document was compressed first, as a cached document
# is. The thin bars are 95 % intervals. A few documents leave them wide, and that is part of the
# answer.

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import numpy as np

from fairkv_jax.evaluate.results import Row
from fairkv_jax.evaluate.summary import figures
from fairkv_jax.viz.curves import Curve, curves

TASKS = {"niah_single": "one fact", "niah_multikey": "one of four facts"}
VIEWS = {"in_view": "question in view", "after": "asked after compression"}


def curve(cells, full, ratios):
    """The score of a method over its ratios, and that of the full cache."""
    cells = sorted([*cells, full], key=lambda cell: -(cell.ratio or 0))
    x = [len(ratios) if cell.ratio is None else ratios.index(cell.ratio) for cell in cells]
    parts = ("mean", "low", "high")
    return Curve(
        np.array(x), *(np.array([getattr(cell.score, part) for cell in cells]) for part in parts)
    )


def panels_of(found, title):
    """Panels of a task's figures by the way of asking, with a line per method."""
    full = next(cell for cell in found if cell.method == "full")
    ratios = sorted({cell.ratio for cell in found if cell.ratio}, reverse=True)
    ticks = {i: f"{1 - ratio:.0%}" for i, ratio in enumerate(ratios)} | {len(ratios): "all"}
    panels = {}
    for cell in found:
        if cell.method != "full":
            lines = panels.setdefault(title.format(VIEWS[cell.question]), {})
            same = [
                each
                for each in found
                if (each.method, each.question) == (cell.method, cell.question)
            ]
            lines[cell.method] = curve(same, full, ratios)
    return panels, ticks


lines = Path("../benchmarks/results/quality.jsonl").read_text(encoding="utf-8").splitlines()
records = [json.loads(line) for line in lines]
answers = [Row(**record) for record in records if "task" in record]
drawn = ("full", "duo_attention", "ada_snapkv")
rows = [row for row in answers if row.sample < 10 and row.method in drawn]
found = figures(rows, by_length=False)
panels = {}
for task, name in TASKS.items():
    of_task, ticks = panels_of([cell for cell in found if cell.task == task], name + ", {}")
    panels |= of_task
after = panels["one fact, asked after compression"]
scores = {method: line.y[list(line.x).index(1)] for method, line in after.items()}  # a fifth kept
best, worst = (choose(scores, key=scores.get) for choose in (max, min))
(count,) = {cell.score.n for cell in found}
print(f"{len(rows)} answers; every point is the mean of {count} documents")
curves(
    panels,
    f"A fifth kept, and asked after compression: {best} answers {scores[best]:.0%}, {worst} "
    f"{scores[worst]:.0%}",
    x_label="kept part of the cache",
    y_label="right answers",
    percent=True,
    columns=2,
    x_ticks=ticks,
)

# %% [markdown]
# How to read it:
#
# - **Question in view**: at a fifth, all methods answer about as well as the whole cache does.
# - **After compression**: the methods differ widely. Those that look at the end of the
#   document, such as `ada_snapkv`, keep what its end attends to, and lose the fact.
# - **Four similar facts**: answers are lost where a single fact is still found.
#
# So first choose a method for the way in which you ask, and then measure *your* task.

# %% [markdown]
# ## Your own text
#
# A file of questions has a line of JSON per question: a context, a question, and what the answer
# must contain. Here are six notes with a fact each. The demo model can answer the questions with
# its whole cache; otherwise there would be nothing to lose, and the evaluation would say so.

# %%
import subprocess
import sys
import tempfile

from fairkv_jax.evaluate.haystack import read_haystack

NOTES = (
    ("The meeting with Anna takes place in room 214.", "In which room is the meeting?", "214"),
    ("The invoice for the blue chairs is number 8306.", "What is the invoice's number?", "8306"),
    ("The name of the new manager is Victoria.", "What is the new manager's name?", "Victoria"),
    ("The neighbour's black cat is called Oscar.", "What is the cat called?", "Oscar"),
    ("The wedding of Peter and Maria is in October.", "When is the wedding?", "October"),
    ("The spare key lies under the flowerpot.", "Where is the spare key?", "flowerpot"),
)
sentences = read_haystack("python").sentences
lines = []
for number, (fact, question, answer) in enumerate(NOTES):
    note = []
    while sum(map(len, note)) < 1100:  # characters, more than 200 tokens
        note.append(sentences[20 * number + len(note)])
    note.insert(1 + number, fact)
    lines.append({"context": " ".join(note), "question": question, "answer": answer})
folder = Path(tempfile.mkdtemp())
(folder / "notes.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
print(json.dumps(lines[1] | {"context": "... " + lines[1]["context"][150:380] + " ..."}, indent=2))

# %% [markdown]
# Say that the notes will be cached, and asked later: so ask after compression, and choose a method
# that does not need to see the question. Two budgets, beside the whole cache:

# %%
arguments = (
    *("--methods", "duo_attention", "--ratios", "0.6,0.8", "--question", "after"),
    *("--tensor-parallel-size", "2", "--max-model-len", "512", "--max-num-seqs", "6"),
)
# Compiled programs are kept on disk, so that the second run is fast.
cache = {
    "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache/fairkv_jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
files = ("--questions", folder / "notes.jsonl", "--output", folder / "results")
done = subprocess.run(
    [sys.executable, "-m", "fairkv_jax.evaluate", *arguments, *files],
    env=cache | os.environ,
    capture_output=True,
    text=True,
)
assert done.returncode == 0, done.stderr
print("python -m fairkv_jax.evaluate --questions notes.jsonl", *arguments)

# %% [markdown]
# It writes a report, and every answer into `results.jsonl`. The figures and their intervals follow
# from these, as above:

# %%
from fairkv_jax.evaluate.results import Results

rows = list(Results(folder / "results").rows.values())
found = figures(rows, by_length=False)
full = next(cell for cell in found if cell.method == "full")
panels, ticks = panels_of(found, "{}")
((line,),) = (lines.values() for lines in panels.values())
scores = ", ".join(f"{score:.0%} with {ticks[x]}" for x, score in zip(line.x, line.y))
curves(
    panels,
    f"duo_attention answers {scores} of the cache",
    x_label=f"kept part of the cache ({full.score.n} documents)",
    y_label="right answers",
    percent=True,
    x_ticks=ticks,
)

# %% [markdown]
# ## The smallest budget that is enough
#
# Say what you may lose, here 20 points of 100. The recommendation is the smallest budget that loses
# at most that, as do all larger ones that were tried. The interval tells how far to trust it:
# six notes are few, so ask more before you rely on it.

# %%
from fairkv_jax.evaluate.summary import recommendations

for each in recommendations(rows, max_loss=0.2):
    advice = "every budget that was tried loses more"
    if each.kept is not None:
        mean, low, high = (100 * getattr(each.loss, part) for part in ("mean", "low", "high"))
        advice = f"keep {each.kept:.0%} (--kv-ratio {each.ratio}), which loses {mean:.0f} points"
        advice += f" ({low:.0f} to {high:.0f})"
    print(f"{each.method}, {VIEWS[each.question]}: {advice}")

# %% [markdown]
# What was answered at the smallest budget, after compression:

# %%
smallest = max(row.ratio for row in rows if row.ratio)
last = [row for row in rows if (row.ratio, row.question) == (smallest, "after")]
for row, (_, question, answer) in zip(last, NOTES):
    said = row.output.strip().split("\n")[0]
    print(f"{'right' if row.score else 'WRONG'}  {question} {said[:48]!r}; it is {answer!r}")

# %% [markdown]
# These notes are short. A fifth of 230 tokens is hardly more than the 40 first and last tokens that
# every head keeps with `duo_attention`, so few heads can keep the fact. In
# [06_serving](06_serving.ipynb), a document of 520 tokens bears the same ratio. That is why a
# budget must be measured on texts like one's own.
#
# More in [docs/quality.md](../docs/quality.md) and
# [docs/how-to/choose-a-budget.md](../docs/how-to/choose-a-budget.md).
