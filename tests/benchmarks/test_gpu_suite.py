"""The GPU suite's own logic, on CPU and at tiny sizes."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from benchmarks.gpu_suite import __main__ as suite
from benchmarks.gpu_suite import bandwidth, demo, numerics, parallel, tune
from benchmarks.gpu_suite.checks import checks
from benchmarks.gpu_suite.head_lengths import head_lengths
from benchmarks.gpu_suite.inputs import PAGE, SMALL, TINY, CacheShape, drawn_lengths, page_table
from benchmarks.gpu_suite.report import markdown
from fairkv_jax.pallas.ragged_decode import Device
from fairkv_jax.pallas.ragged_decode.tiles import MosaicTile, TritonTile, device_tiles
from fairkv_jax.plan import CostModel, ModelShape, make_plan

CPU = Device("cpu", "cpu")
LLAMA = "llama-3.1-8b"


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """A folder with a profile of the form of the published ones: 5 prompts, 32 layers, 8 heads."""
    rng = np.random.default_rng(0)
    kept = 1000 * (rng.gamma(1.5, size=(32, 8)) + 0.1) * rng.uniform(0.8, 1.2, (5, 32, 8))
    np.savez(tmp_path / f"{LLAMA}-instruct__ea.npz", kept=kept.astype(np.int32))
    return tmp_path


def test_without_a_gpu_nothing_is_measured(tmp_path: Any, capsys: Any) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU here")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["gpu_suite", f"--output={tmp_path}"])
    with flagsaver.flagsaver(output=str(tmp_path)), pytest.raises(SystemExit) as stop:
        suite.main([])
    assert stop.value.code == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lengths_have_the_mean_and_the_imbalance() -> None:
    even = drawn_lengths(0, 4, 3, 8, 1000, 0.0)
    assert (even == 1000).all()
    uneven = drawn_lengths(0, 40, 3, 8, 1000, 0.6)
    assert uneven.mean() == pytest.approx(1000, rel=0.01)
    by_head = uneven.mean(1)
    assert (by_head.std(1) / by_head.mean(1)).mean() == pytest.approx(0.55, abs=0.15)


def test_no_two_lengths_share_a_page() -> None:
    lengths = drawn_lengths(0, 2, 3, 2, 40, 0.6)
    shape = CacheShape.of(lengths, lengths // 2, room=1)
    table = page_table(0, lengths, shape, room=1)
    pages = -(-(lengths + 1) // PAGE)
    starts = np.asarray(table.starts)
    entries = [starts[at] + i for at in np.ndindex(starts.shape) for i in range(pages[at])]
    used = np.asarray(table.pages)[entries]
    assert sorted(used) == list(range(shape.num_pages))


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
def test_every_head_of_every_row_has_one_owner(strategy: str) -> None:
    (heads,) = head_lengths(replace(TINY, shapes={LLAMA: SMALL.shapes[LLAMA]}))
    assert heads.profile == "synthetic"
    plan = make_plan(heads.at(256), 4, strategy)
    rows = heads.rows(5, 256)
    owned = parallel.owned_lengths(rows, plan)
    assert ((owned > 0).sum((2, 3)) == plan.num_heads).all()
    assert (owned.sum((2, 3)) == rows.sum(2).T).all()


def test_rows_are_the_prompts_of_the_published_profile(profiles: Path) -> None:
    (heads,) = head_lengths(replace(SMALL, profiles=profiles))
    assert (heads.model, heads.profile) == (LLAMA, "ea")
    kept = np.load(next(profiles.glob("*.npz")))["kept"][:, ::2]  # 16 of the 32 layers
    scaled = np.rint(kept * (512 / kept.mean())).astype(int)
    rows = heads.rows(7, 512)
    assert {row.tobytes() for row in scaled} == {row.astype(int).tobytes() for row in rows}
    assert heads.at(512).array.mean() == pytest.approx(512)
    other = ModelShape(20, 64, 8, 8, 16, 128, 256)
    with pytest.raises(ValueError, match="32 layers x 8 heads, which do not fit 20 x 8"):
        list(head_lengths(replace(SMALL, profiles=profiles, shapes={LLAMA: other})))


@pytest.mark.slow
def test_strategies_are_compared_on_a_cpu(profiles: Path) -> None:
    """At these widths, a slot costs little, so that copies pay where there are many tokens."""
    sizes = replace(
        SMALL,
        profiles=profiles,
        shapes={LLAMA: ModelShape(2, 64, 16, 8, 16, 128, 256)},
        points=((2, 256), (2, 4096)),
        devices=(4,),
        least_pages=0,
        repeats=3,
    )
    fitted, *records = parallel.measure(sizes, CPU)
    assert fitted["token_ns"] > 0
    assert [record["strategy"] for record in records] == 2 * list(parallel.STRATEGIES)
    static, _, fair = records[3:]
    assert fair["copies"] > 0
    assert fair["utilization_of_tokens"] > static["utilization_of_tokens"]
    assert fair["predicted_tokens_per_second_over_static"] > 1
    assert static["tokens_per_second_over_static"] == static["measured_over_predicted"] == 1
    assert fair["wall_tokens_per_second_over_static"] > 0
    assert "all_reduce_estimate_ms" not in fair  # there is no link between these devices
    table = markdown({"about": {"device": "cpu"}, "parallel": [fitted, *records]})
    assert "| llama-3.1-8b | ea | 4 | batch | 2 x 4,096 |" in table
    assert "costs of attention" in table


def test_a_cpu_measures_no_kernels(tmp_path: Path) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["gpu_suite"])
    with (
        flagsaver.flagsaver(cpu=True, parts=["numerics"], output=str(tmp_path)),
        pytest.raises(app.UsageError, match="--cpu does not measure numerics"),
    ):
        suite.main([])
    assert not list(tmp_path.iterdir())


def test_every_backend_passes_and_a_wrong_one_would_not() -> None:
    records = list(numerics.measure(TINY, CPU))
    assert {record["backend"] for record in records} == {"reference", "triton", "mosaic"}
    about = {"device": "cpu"}
    assert suite.passed({"about": about, "numerics": records})
    wrong = {**records[0], "error": 1.0, "passed": False}
    assert not suite.passed({"about": about, "numerics": [*records, wrong]})
    assert not suite.passed({"about": about, "numerics": records, "demo": [{"failed": "why"}]})
    assert "| 64 |" in markdown({"about": about, "numerics": records})


@pytest.mark.long
def test_bandwidth_counts_the_bytes_of_the_tokens() -> None:
    copy, *records = bandwidth.measure(TINY, CPU)
    assert copy["implementation"] == "copy"
    timed = [record for record in records if "failed" not in record]
    assert {record["implementation"] for record in timed} >= {"reference", "triton"}
    for record in timed:
        # Keys and values of 2 rows x 8 heads x 40 tokens of width 64, two bytes each.
        read = record["bytes_per_second"] * record["layer_us"] * 1e-6
        assert read == pytest.approx(2 * 8 * 40 * 2 * 64 * 2, rel=0.1)


@pytest.mark.slow
def test_strategies_are_compared_with_static() -> None:
    records = list(parallel.measure(TINY, CPU))
    ((model, shape),) = TINY.shapes.items()
    (heads,) = head_lengths(TINY)
    cost = CostModel.of(shape, 2, "CPU", batch=3)
    plan = make_plan(heads.at(40), 2, "static", cost=cost)
    assert (records[0]["model"], records[0]["strategy"]) == (model, "static")
    assert records[0]["predicted_tokens_per_second"] == pytest.approx(plan.tokens_per_second)
    assert len(json.loads(json.dumps(checks({"parallel": records})))) == 2
    assert {record["strategy"] for record in records} == set(parallel.STRATEGIES)
    for record in records:
        if record["strategy"] == "static":
            assert record["tokens_per_second_over_static"] == 1
        assert record["predicted_tokens_per_second_over_static"] >= 0.999


def test_a_part_that_breaks_off_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"figure": 1}
        raise RuntimeError("out of memory\nand more")

    def lasts(*_: Any) -> Iterator[dict[str, Any]]:
        yield from ({"figure": number} for number in itertools.count())

    monkeypatch.setitem(suite.PARTS, "demo", (breaks, 60))
    monkeypatch.setitem(suite.PARTS, "parallel", (lasts, 0))
    results: dict[str, Any] = {"about": {}}
    assert list(suite.run("demo", TINY, CPU, results, 60))
    assert results["demo"] == [{"figure": 1}, {"failed": "RuntimeError: out of memory and more"}]
    assert not suite.passed(results)
    assert list(suite.run("parallel", TINY, CPU, results, 0))
    assert results["parallel"] == [{"figure": 0}]
    assert "parallel_ended" in results["about"]


@pytest.mark.slow
@pytest.mark.long
def test_the_server_answers_every_request_of_the_load() -> None:
    (record,) = demo.serve(TINY, CPU)
    assert record["requests"] == demo.REQUESTS_PER_ROW * record["streams"]
    assert record["tokens_per_second"] > 0
    assert record["e2el_p50_ms"] > record["ttft_p50_ms"] > 0


def test_figures_are_held_against_the_limits() -> None:
    def record(name: str, lengths: str, speed: float, batch: int = 64) -> dict[str, Any]:
        common = {"width": 128, "batch": batch, "implementation": name, "lengths": lengths}
        return common | {"bytes_per_second": speed, "of_copy": speed / 10}

    bandwidth_records = [
        record("triton", "imbalanced", 8.5),
        record("triton", "uniform", 9.0),
        record("triton", "imbalanced", 1.0, batch=8),
        record("mosaic", "imbalanced", 7.0),
        record("mosaic", "uniform", 9.0),
        record("reference", "imbalanced", 0.5),
        record("some peer", "imbalanced", 6.0),
        record("some peer", "uniform", 9.5),
        record("another", "imbalanced", 3.0),
        {"width": 128, "batch": 64, "implementation": "broken", "failed": "why"},
    ]
    plans = [
        {"strategy": "fair_copying", "tokens_per_second_over_static": measured}
        | {"predicted_tokens_per_second_over_static": predicted}
        for measured, predicted in ((1.3, 1.4), (1.2, 1.2))
    ]
    found = checks({"bandwidth": bandwidth_records, "parallel": plans})
    values = {check["check"]: (round(check["value"], 3), check["holds"]) for check in found}
    assert values == {
        "triton of the copy": (0.85, True),
        "triton over the peers": (1.417, True),
        "triton for imbalance": (1.059, True),
        "mosaic of the copy": (0.7, False),
        "mosaic over the peers": (1.167, False),
        "mosaic for imbalance": (1.286, False),
        "fair_copying over static": (1.2, True),
        "that, of the predicted": (0.929, False),
    }
    assert checks({}) == []


def test_the_fastest_tiles_are_kept() -> None:
    present = device_tiles("NVIDIA H200")
    tile = TritonTile(block_tokens=64, num_stages=3, programs=1056, min_blocks=2, num_warps=4)
    others = tune.candidates(tile)
    assert tile == others[0]
    assert len(others) == len(set(others)) == 11
    slow, fast = asdict(others[1]), asdict(others[2])
    mosaic = asdict(MosaicTile(64, 4, 1056, 2))
    records = [
        {"backend": "triton", "width": 128, "layer_us": 7.0} | fast,
        {"backend": "triton", "width": 128, "layer_us": 9.0} | slow,
        {"backend": "mosaic", "width": 128, "layer_us": 6.0} | mosaic,
        {"backend": "mosaic", "width": 128, "failed": "too large"} | mosaic,
    ]
    file = tune.best_tiles(records, Device("gpu", "NVIDIA H200"), "a test")
    assert file["match"] == "H200"
    assert file["order"] == ["mosaic", "triton", "reference"]
    assert file["tiles"]["triton"]["2"]["128"] == fast
    assert file["tiles"]["triton"]["2"]["64"] == present.tiles["triton"]["2"]["64"]
