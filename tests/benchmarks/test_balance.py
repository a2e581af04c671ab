"""The comparison of strategies on published profiles, on small profiles of the same form."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.balance import compare, published
from benchmarks.balance.published import MODELS, PublishedModel, PublishedProfile, read_profiles
from fairkv_jax.plan import CostModel, ModelShape, make_plan
from tests.serve.live import ROOT

SHAPE = ModelShape(3, 512, 8, 4, 64, 1024, 32_000)
SMALL = PublishedModel("small", "small", SHAPE)


def profile(model: PublishedModel, layers: int = 3, heads: int = 4) -> PublishedProfile:
    rng = np.random.default_rng(0)
    means = rng.gamma(1.5, size=(layers, heads)) + 0.1
    return PublishedProfile(model, "ea", means * rng.uniform(0.8, 1.2, (6, layers, heads)))


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


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no profile: put files MODEL__SCORER"):
        list(read_profiles(tmp_path))
    np.savez(tmp_path / f"{MODELS[0].file}__ea.npz", kept=np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"3 layers x 4 heads, but Llama-3.1-8B has 32 x 8"):
        list(read_profiles(tmp_path))


def test_the_command_writes_tables_and_a_page_that_loads_nothing(tmp_path, monkeypatch):
    """One profile with the heads of a published model, by the command itself."""
    model = next(each for each in MODELS if each.heads_per_unit == 2)
    kept = np.random.default_rng(1).gamma(2, size=(4, model.shape.num_layers, model.units)) + 0.1
    np.savez(tmp_path / f"{model.file}__ea.npz", kept=kept * 1000)
    command = [sys.executable, "-m", "benchmarks.balance", "--profiles", str(tmp_path)]
    output = tmp_path / "results"
    subprocess.run(
        [*command, "--output_dir", str(output)], check=True, cwd=ROOT, timeout=300,
        capture_output=True,
    )  # fmt: skip
    record = json.loads((output / "balance.json").read_text(encoding="utf-8"))
    (found,) = record["records"]
    assert (found["model"], found["devices"]) == (model.name, 2)
    cells = np.array(found["equal_batch"]["fair copying"]["step_ratio"])
    assert cells.shape == (len(compare.BATCHES), len(compare.KEPT))
    assert (cells >= 1).all()
    assert cells[-1, -1] > cells[0, 0]
    markdown = (output / "balance.md").read_text(encoding="utf-8")
    shown = cells[compare.BATCHES.index(64), compare.KEPT.index(2048)]
    assert f"**{shown:.2f}x**" in markdown
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
