"""The examples in the docstrings of the public names run, in the order of the reference."""

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

import fairkv_jax
from fairkv_jax import LLM, SamplingParams, plan, profile
from fairkv_jax.engine.request import CachedPrefix, CompletionOutput, RequestOutput
from fairkv_jax.sampling_params import StructuredOutputsParams

OF_THE_PLANNER = (
    plan.Profile, plan.shipped_profile, plan.make_plan, plan.Plan, plan.CostModel,
    plan.default_cost, plan.calibrate, plan.ModelShape, plan.find_shape, plan.HeadScores,
    plan.shipped_head_scores, plan.simulate, plan.Workload, plan.simulate_document, plan.route,
    plan.route_beyond, plan.row_counts, profile.read_table, profile.from_duo_attention,
    profile.read_headkv_json, profile.from_headkv, profile.synthetic_profile,
)  # fmt: skip
OF_THE_ENGINE = (
    SamplingParams, StructuredOutputsParams, LLM, LLM.generate, LLM.chat, LLM.cache_prefix,
    RequestOutput, CompletionOutput, CachedPrefix, LLM.prefixes, LLM.delete_prefix,
    LLM.prefill_logits, LLM.get_tokenizer,
)  # fmt: skip


def run(objects: tuple[Any, ...], names: dict[str, Any]) -> None:
    """Runs the examples of each object; names that they define stay for the following ones."""
    finder, parser = doctest.DocTestFinder(recurse=False), doctest.DocTestParser()
    for each in objects:
        examples = parser.get_examples(finder.find(each)[0].docstring or "")
        assert examples, f"{each.__qualname__} has no example"
        test = doctest.DocTest(examples, names, each.__qualname__, None, None, None)
        test.globs = names
        failed = doctest.DocTestRunner().run(test, clear_globs=False).failed
        assert not failed, f"see above: {each.__qualname__}"


def test_examples_of_the_planner():
    run(OF_THE_PLANNER, {})


def test_examples_of_the_engine(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def tiny_llm(model: str, **options: Any) -> LLM:
        assert model == "SmolLM2-135M-Instruct"
        return LLM(tiny_checkpoint, progress=False, **options)

    monkeypatch.setattr(fairkv_jax, "LLM", tiny_llm, raising=False)
    run(OF_THE_ENGINE, {})


def test_every_name_of_the_reference_has_an_example():
    assert {"LLM", "SamplingParams"} == {*fairkv_jax.__all__} - {"__version__"}
    reference = Path(__file__).parents[1] / "docs" / "reference" / "python.md"
    listed = re.findall(r"^::: .*\.(\w+)$", reference.read_text(encoding="utf-8"), re.MULTILINE)
    methods = [name for name in vars(LLM) if not name.startswith("_")]
    run_here = {each.__qualname__ for each in (*OF_THE_PLANNER, *OF_THE_ENGINE)}
    assert run_here == {*listed, *(f"LLM.{name}" for name in methods)}


def test_every_name_of_the_planner_is_shown_in_an_example():
    """Types that are only returned have none of their own: where one is returned, it is named."""
    finder, parser = doctest.DocTestFinder(recurse=False), doctest.DocTestParser()
    shown = ""
    for each in OF_THE_PLANNER:
        examples = parser.get_examples(finder.find(each)[0].docstring or "")
        shown += each.__name__ + "".join(f" {one.source} {one.want}" for one in examples)
    public = [name for name in (*plan.__all__, *profile.__all__) if not name.isupper()]
    assert [name for name in public if not re.search(rf"\b{name}\b", shown)] == []
