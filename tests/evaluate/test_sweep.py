"""Sweeps: what is run, resumed and left out, and what is concluded."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fairkv_jax.evaluate.report import write_report
from fairkv_jax.evaluate.results import Results
from fairkv_jax.evaluate.summary import figures, recommendations
from fairkv_jax.evaluate.sweep import Sweep
from fairkv_jax.evaluate.user_data import passages, read_questions
from tests.evaluate.scripted import make_plan, opener


def test_an_interrupted_sweep_goes_on(tmp_path: Path):
    """Whatever the number of documents before the interruption; nothing runs twice."""
    plan, log = make_plan(), []
    Sweep(plan, Results(tmp_path / "whole"), opener(log), show=False).run()
    whole = Results(tmp_path / "whole").rows
    assert len(log) == len(set(log)) == 10 * 2 * 2 * (1 + 4)
    for budget in (0, 7, 20, 93, 150):
        folder, parts = tmp_path / str(budget), []
        with pytest.raises(KeyboardInterrupt):
            Sweep(plan, Results(folder), opener(parts, budget), show=False).run()
        with (folder / "results.jsonl").open("a") as file:
            file.write('{"task": "cut off')
        recorded = Results(folder)
        done = len(recorded.rows)
        rest: list[tuple] = []
        Sweep(plan, recorded, opener(rest), show=False).run()
        assert Results(folder).rows == whole
        per_document = {row.sample: row.index for row in recorded.rows.values()}
        assert set(per_document) == set(range(10))
        # Only the batch that was interrupted is lost.
        assert len(parts) + len(rest) - len(log) < 8
        assert done <= 2 * len(parts)


def test_more_samples_and_methods_run_only_what_is_new(tmp_path: Path):
    log: list[tuple] = []
    Sweep(make_plan(num_samples=4), Results(tmp_path), opener(log), show=False).run()
    before = len(log)
    plan = make_plan(num_samples=6, methods=("streaming_llm", "snapkv"), protocols=("in_view",))
    sweep = Sweep(plan, Results(tmp_path), opener(log), show=False)
    sweep.run()
    assert len(log) == len(set(log))
    assert len(log) - before == 2 * 2 * (2 + 2 * 2 + 6 * 2)
    assert {row.question for row in sweep.rows()} == {None, "in_view"}
    changed = make_plan(num_samples=4, model={"model": "another"})
    assert not Sweep(changed, Results(tmp_path), opener(log), show=False).rows()


def test_tasks_that_full_does_not_solve_are_left_out(tmp_path: Path):
    """No answer to these tasks stands in the document as it is asked for."""
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"context": "a b", "question": "c", "answer": "not there"}))
    log: list[tuple] = []
    plan = make_plan(questions=tuple(read_questions(str(path))), tasks=("niah_single",))
    sweep = Sweep(plan, Results(tmp_path), opener(log), show=False)
    sweep.run()
    assert sweep.unsolved() == {("questions", None): 0.0}
    assert [entry for entry in log if entry[3] == "a b"] == [("full", None, "in_view", "a b")]
    write_report(sweep, 0.05, tmp_path)
    assert (
        "questions is not compared where the full cache scores below 50: 0."
        in (tmp_path / "report.md").read_text()
    )


def test_what_is_refused_is_named_and_the_rest_goes_on(tmp_path: Path):
    plan = make_plan(methods=("snapkv", "streaming_llm"))
    sweep = Sweep(plan, Results(tmp_path), opener([]), show=False)
    sweep.run()
    assert sweep.refused == {"snapkv, after": "kv_policy snapkv looks at the end"}
    assert {row.method for row in sweep.rows() if row.question == "after"} == {"streaming_llm"}


def test_figures_and_recommendations(tmp_path: Path):
    """The scripted method loses what stands in the dropped beginning."""
    sweep = Sweep(make_plan(num_samples=40), Results(tmp_path), opener([]), show=False)
    sweep.run()
    rows = sweep.rows()
    for figure in figures(rows, by_length=True):
        mine = [
            row
            for row in rows
            if (row.task, row.method, row.ratio, row.question, row.length)
            == (figure.task, figure.method, figure.ratio, figure.question, figure.length)
        ]
        assert figure.score.mean == pytest.approx(np.mean([row.score for row in mine]))
        assert figure.score.n == 40
        if figure.method == "full":
            assert (figure.score.mean, figure.difference) == (1, None)
        else:
            assert figure.difference is not None
            assert figure.difference.mean == pytest.approx(figure.score.mean - 1)
    losses = {}
    for max_loss in (0.0, 0.15, 0.6):
        for each in recommendations(rows, max_loss):
            losses[max_loss, each.question] = each.ratio
    for question in ("in_view", "after"):
        assert [losses[x, question] for x in (0.0, 0.15, 0.6)] == [None, 0.1, 0.5]


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_the_figures(tmp_path: Path):
    sweep = Sweep(make_plan(), Results(tmp_path), opener([]), show=False)
    sweep.run()
    write_report(sweep, 0.05, tmp_path)
    text = (tmp_path / "report.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text)
    assert json.loads(data) == json.loads((tmp_path / "results.json").read_text())
    assert len(json.loads(data)["figures"]) == 2 * 2 * (1 + 2 * 2)
    page = Page(text)
    outside = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")
    ]
    assert not outside
    assert "http" not in re.sub(r"<script.*?</script>", "", text)
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels.count("niah_single, question in view") == 1
    assert sum(label.startswith("depths, ") for label in labels) == 1 + 2 * 2
    # A line's markers stand where the figures say: 100 % is at the height of the full line.
    for task, question in ((t, q) for t in sweep.plan.tasks for q in sweep.plan.protocols):
        words = {"in_view": "question in view", "after": "question after compression"}[question]
        (chart,) = re.findall(rf'<svg[^>]*aria-label="{task}, {words}".*?</svg>', text)
        pooled = {
            f.kept: f.score.mean
            for f in figures(sweep.rows(), by_length=False)
            if (f.task, f.question) == (task, question)
        }
        (path,) = re.findall(r'<polyline[^>]*points="([^"]*)"', chart)
        points = np.array([[float(v) for v in pair.split(",")] for pair in path.split()])
        (full,) = re.findall(r'class="full"[^>]* y1="([\d.]+)"', chart)
        kept = sorted(pooled)
        scores = np.array([pooled[k] for k in kept])
        bottom = max(float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', chart))
        want = bottom - scores * (bottom - float(full))
        np.testing.assert_allclose(points[:, 1], want, atol=0.11)
        assert (np.diff(points[:, 0]) > 0).all()


def test_own_questions(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    lines = [
        {"context": "a", "question": "b", "answer": "c"},
        {"context": "a", "question": "d", "answer": ["e", "f"]},
        {"context": "g", "question": "h", "answer": "i"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = read_questions(str(path))
    assert [question.answers for question in first.questions] == [("c",), ("e", "f")]
    assert (second.text, second.questions[0].score("it is I")) == ("g", 1)
    for bad in ('{"context": "a"', '{"context": "a", "question": "b", "answer": []}', "[]"):
        path.write_text(f"{json.dumps(lines[0])}\n{bad}")
        with pytest.raises(ValueError, match="line 2 of"):
            read_questions(str(path))


def test_passages_are_spread_over_the_text():
    text = list(range(1000))
    found = passages(text, 100, 4)
    assert [len(each) for each in found] == [197] * 4
    assert (found[0][0], found[-1][-1]) == (0, 999)
    with pytest.raises(ValueError, match="--text has 1000 tokens, but 4 passages of 950"):
        passages(text, 950, 4)


def test_a_file_that_is_no_result(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is not a result"):
        Results(tmp_path)
