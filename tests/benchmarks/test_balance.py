"""The comparison of strategies on published profiles, on small profiles of the same form."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.balance import compare, published
from benchmarks.balance.measure import measure
from benchmarks.balance.published import (
    MODELS,
    SCORED_MODELS,
    DuoAttentionScores,
    PublishedModel,
    PublishedProfile,
    read_profiles,
    read_scores,
)
from fairkv_jax.plan import CostModel, HeadScores, ModelShape, make_plan
from tests.serve.live import ROOT

SHAPE = ModelShape(3, 512, 8, 4, 64, 1024, 32_000)
SMALL = PublishedModel("small", "small", SHAPE)


def profile(model: PublishedModel, layers: int = 3, heads: int = 4) -> PublishedProfile:
    rng = np.random.default_rng(0)
    means = rng.gamma(1.5, size=(layers, heads)) + 0.1
    return PublishedProfile(model, "ea", means * rng.uniform(0.8, 1.2, (6, layers, heads)))


def duo_attention() -> DuoAttentionScores:
    scores = np.random.default_rng(2).uniform(size=(3, 4))
    rows = tuple(tuple(row) for row in scores.tolist())
    table = HeadScores("small", "duo_attention", rows, sinks=128, recent=256)
    return DuoAttentionScores(SMALL, "duo_attention", table)


def write_scores(folder: Path, name: str, table: np.ndarray) -> None:
    np.savetxt(folder / f"{name}.tsv", table, delimiter="\t")


@pytest.mark.parametrize(("batch", "kept"), [(1, 512), (16, 1024), (256, 16384)])
def test_the_candidates_contain_the_planners_choice(batch, kept):
    """Plans are searched once for all batches and budgets: no cost may have a better one."""
    given = profile(SMALL)
    found = compare.candidates(given.at(compare.KEPT[0]), 4)
    cost = SMALL.cost(4, "H100", batch)
    chosen = compare.choose(found, given.at(kept), cost)
    for name, (kind, split) in compare.COMPARED.items():
        plan = make_plan(given.at(kept), 4, kind, row_split=split, cost=cost, effort=0)
        assert chosen[name].tokens_per_second == pytest.approx(plan.tokens_per_second, rel=1e-4)
        assert chosen[name].utilization == pytest.approx(plan.utilization, rel=1e-3)
        assert chosen[name].slots == plan.slots


def test_equal_memory_takes_the_batch_that_the_planner_finds():
    given, memory = profile(SMALL), 2e9
    cost = SMALL.cost(4, "H100", 1)
    found = compare.candidates(given.at(1024), 4)
    chosen = compare.choose(found, given.at(8192), cost, memory)
    for name, (kind, split) in compare.COMPARED.items():
        plan = make_plan(
            given.at(8192), 4, kind, row_split=split, cost=cost, effort=0,
            objective="throughput", device_bytes=memory,
        )  # fmt: skip
        assert chosen[name].cost.batch == pytest.approx(plan.cost.batch, rel=0.01)
        assert chosen[name].tokens_per_second == pytest.approx(plan.tokens_per_second, rel=0.01)
    with pytest.raises(ValueError, match="does not fit into 1e\\+06 bytes"):
        compare.choose(found, given.at(8192), cost, 1e6)


def test_the_cost_of_a_dense_model_is_the_planners():
    expected = CostModel.of(SHAPE, 4, "H100", batch=8)
    found = SMALL.cost(4, "H100", 8)
    for name in ("a_seconds", "b_seconds_per_token", "rest_seconds", "rest_bytes", "head_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))


def test_experts_are_read_when_a_row_selects_them():
    model = PublishedModel("moe", "moe", SHAPE, experts=8, experts_per_token=2, mlp_itemsize=0.5)
    dense = SMALL.cost(1, "H100", 1)
    mlp = 3 * 3 * 512 * 1024
    one, many = model.cost(1, "H100", 1), model.cost(1, "H100", 256)
    # All experts are in memory, at half a byte; a single row reads a quarter of them.
    assert one.rest_bytes == many.rest_bytes == pytest.approx(dense.rest_bytes - 1.5 * mlp)
    assert (many.rest_seconds - one.rest_seconds) * 3.35e12 == pytest.approx(0.75 * mlp * 0.5)


def test_layers_with_a_window_hold_it_at_every_budget():
    model = PublishedModel("window", "window", SHAPE, sliding_layers=1, window=100)
    given = profile(model, layers=2)
    tokens = given.at(4096).array
    assert tokens[:2].mean() == pytest.approx(4096)
    assert tokens[2].tolist() == [100] * 4


def test_heads_that_were_measured_together_cost_twice():
    pairs = PublishedModel("pairs", "pairs", SHAPE, heads_per_unit=2).cost(2, "H100", 8)
    single = SMALL.cost(2, "H100", 8)
    assert pairs.a_seconds == pytest.approx(2 * single.a_seconds)
    assert pairs.token_bytes == 2 * single.token_bytes
    assert pairs.rest_bytes == pytest.approx(single.rest_bytes)


def test_plans_are_replayed_on_prompts_that_they_have_not_seen():
    given = profile(SMALL)
    kept = given.kept.copy()
    kept[compare.REPLAYED] = kept[compare.REPLAYED, :, ::-1]  # these prompts use other heads
    same = compare.held_out(given, 2, "H100")["strategies"]["fair copying"]
    other = compare.held_out(PublishedProfile(SMALL, "ea", kept), 2, "H100")
    assert other["strategies"]["fair copying"]["utilization"] < same["utilization"] - 0.03


def test_the_highest_scores_of_duo_attention_keep_a_prompt_of_five_times_the_mean():
    given = duo_attention()
    tokens = given.at(2048).array
    assert tokens.mean() == pytest.approx(2048, abs=1)
    by_score = tokens.ravel()[np.argsort(-given.scores.array.ravel())]
    # 12 heads of 10,240 tokens, of which a fifth is left beside 384 tokens in every head.
    whole, rest = divmod(12 * (2048 - 384), 10_240 - 384)
    assert by_score.tolist() == [10_240] * whole + [384 + rest] + [384] * (11 - whole)


def test_budgets_that_do_not_scale_are_planned_at_every_budget():
    """Fixed sinks and recent tokens weigh less the longer a prompt is."""
    given = duo_attention()
    record = compare.compare(given, 4, "H100")
    row = compare.BATCHES.index(64)
    for kept in (compare.KEPT[0], compare.KEPT[-1]):
        cost = SMALL.cost(4, "H100", 64)
        for name, (kind, split) in compare.COMPARED.items():
            plan = make_plan(given.at(kept), 4, kind, row_split=split, cost=cost, effort=0)
            found = record["equal_batch"][name]["utilization"][row][compare.KEPT.index(kept)]
            assert found == pytest.approx(plan.utilization, rel=1e-3)
    assert record["held_out"] is None


def test_budgets_by_headkv_share_a_pool_in_proportion_to_the_scores(tmp_path):
    model = next(each for each in SCORED_MODELS if each.name == "Mistral-7B-v0.2")
    scores = np.random.default_rng(3).uniform(1, 2, (32, 32))
    write_scores(tmp_path, f"headkv_{model.file}_retrieval_heads", scores)
    (given,) = read_scores(tmp_path)
    assert (given.model, given.scorer) == (model, "headkv_retrieval")
    groups = scores.reshape(32, 8, 4).mean(2)
    # A window of 8, a sixth of the rest in every head, and the pool of the other five sixths.
    expected = 8 + 2040 / 6 + 2040 * 5 / 6 * groups / groups.mean()
    assert given.at(2048).array == pytest.approx(expected)
    assert given.at(4096).array == pytest.approx(2 * expected)


def test_records_are_reused_unless_the_settings_differ(tmp_path):
    np.savez(tmp_path / f"{MODELS[0].file}__ea.npz", kept=np.ones((2, 32, 8)))
    known = {"model": MODELS[0].name, "scorer": "ea", "devices": 8}
    old = {
        "hardware": "H100",
        "memory_for_use": compare.MEMORY_FOR_USE,
        "batches": list(compare.BATCHES),
        "kept": list(compare.KEPT),
        "records": [known, known | {"devices": 4}],
    }
    # Nothing is missing, so that nothing is compared; what is not asked for is dropped.
    assert measure(tmp_path, None, [8], "H100", 1, old)["records"] == [known]
    with pytest.raises(ValueError, match="hardware of balance\\.json is H100, not H200"):
        measure(tmp_path, None, [8], "H200", 1, old)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no profile: put files MODEL__SCORER"):
        list(read_profiles(tmp_path))
    np.savez(tmp_path / f"{MODELS[0].file}__ea.npz", kept=np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"3 layers x 4 heads, but Llama-3.1-8B has 32 x 8"):
        list(read_profiles(tmp_path))
    with pytest.raises(ValueError, match="holds no head scores: put files duoattention_MODEL"):
        list(read_scores(tmp_path))
    write_scores(tmp_path, f"headkv_{SCORED_MODELS[0].file}_retrieval_heads", np.ones((32, 8)))
    with pytest.raises(ValueError, match=r"32 layers x 8 heads, but Llama-3.1-8B has 32 x 32"):
        list(read_scores(tmp_path))


def test_the_command_writes_tables_and_a_page_that_loads_nothing(tmp_path, monkeypatch):
    """A profile and head scores with the heads of published models, by the command itself."""
    model = next(each for each in MODELS if each.heads_per_unit == 2)
    kept = np.random.default_rng(1).gamma(2, size=(4, model.shape.num_layers, model.units)) + 0.1
    np.savez(tmp_path / f"{model.file}__ea.npz", kept=kept * 1000)
    scored = SCORED_MODELS[0]
    scores = np.random.default_rng(4).uniform(size=(32, scored.units))
    write_scores(tmp_path, f"duoattention_{scored.file}", scores)
    folder = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.balance", "--profiles", folder, "--devices", "2"]
    output = tmp_path / "results"
    subprocess.run(
        [*command, "--scores", folder, "--output_dir", str(output)],
        check=True, cwd=ROOT, timeout=300, capture_output=True,
    )  # fmt: skip
    record = json.loads((output / "balance.json").read_text(encoding="utf-8"))
    found, by_scores = record["records"]
    assert (by_scores["model"], by_scores["held_out"]) == (scored.name, None)
    assert (found["model"], found["devices"]) == (model.name, 2)
    cells = np.array(found["equal_batch"]["fair copying"]["step_ratio"])
    assert cells.shape == (len(compare.BATCHES), len(compare.KEPT))
    assert (cells >= 1).all()
    assert cells[-1, -1] > cells[0, 0]
    markdown = (output / "balance.md").read_text(encoding="utf-8")
    shown = cells[compare.BATCHES.index(64), compare.KEPT.index(2048)]
    assert f"**{shown:.2f}x**" in markdown
    assert "over 1 retention profiles" in markdown
    assert "over 1 tables of head scores" in markdown
    tables = markdown.split("\n## ")
    listed = {table.split("\n")[0]: table.count("\n| ") - 1 for table in tables if "\n|--" in table}
    assert listed == {
        "Equal batch": 2,
        "From which batch and budget on": 2,
        "Equal memory": 3,  # DuoAttention's at two budgets, since they do not scale
        "Prompts that the plan has not seen": 1,
    }
    page = (output / "balance.html").read_text(encoding="utf-8")
    assert "__" not in page.split("<script>")[0]
    assert set(re.findall(r"""(?:src|href)=["']([^"'#]+)""", page)) == {"balance.md"}


def test_the_shipped_results_are_those_of_the_published_profiles():
    """README quotes these figures: the comparison must still find them."""
    folder = Path(ROOT / "benchmarks/results")
    record = json.loads((folder / "balance.json").read_text(encoding="utf-8"))
    assert record["licence"] == published.LICENCE
    row, column = record["batches"].index(64), record["kept"].index(2048)
    means = {tuple(name.split(", ")): kept for name, kept in record["mean_kept"].items()}
    for found in record["records"]:
        if (found["model"], found["devices"]) != ("Llama-3.1-8B", 4):
            continue
        if found["scorer"] not in published.SCORERS:
            continue
        given = PublishedProfile(
            MODELS[0], found["scorer"], np.array([means[found["model"], found["scorer"]]], float)
        )
        plan_profile = given.at(2048)
        chosen = compare.choose(
            compare.candidates(plan_profile, 4), plan_profile, MODELS[0].cost(4, "H100", 64)
        )
        ratio = chosen["fair copying"].tokens_per_second / chosen["static"].tokens_per_second
        expected = found["equal_batch"]["fair copying"]["step_ratio"][row][column]
        assert ratio == pytest.approx(expected, rel=2e-3)


@pytest.mark.skipif(
    "FAIRKV_HEAD_SCORES" not in os.environ, reason="FAIRKV_HEAD_SCORES names no folder"
)
def test_the_shipped_results_are_those_of_the_published_scores():
    text = (ROOT / "benchmarks/results/balance.json").read_text(encoding="utf-8")
    records = [
        each for each in json.loads(text)["records"] if each["scorer"] in published.HEAD_SCORES
    ]
    given = list(read_scores(Path(os.environ["FAIRKV_HEAD_SCORES"])))
    names = {(each.model.name, each.scorer) for each in given}
    assert {(each["model"], each["scorer"]) for each in records} == names
    (scores,) = (each for each in given if each.model.name == "Mistral-7B-v0.3")
    (record,) = (r for r in records if r["model"] == "Mistral-7B-v0.3" and r["devices"] == 4)
    found = compare.compare(scores, 4, "H100")
    for name in compare.COMPARED:
        shipped = np.array(record["equal_batch"][name]["step_ratio"])
        assert np.array(found["equal_batch"][name]["step_ratio"]) == pytest.approx(
            shipped, rel=2e-3
        )
