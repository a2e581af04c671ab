"""The examples in the docstrings of the public names run."""

import doctest
from typing import Any

from fairkv_jax.plan import Plan, Profile, make_plan
from fairkv_jax.sampling_params import SamplingParams, StructuredOutputsParams

OBJECTS = (SamplingParams, StructuredOutputsParams, Profile, make_plan, Plan)


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


def test_examples_without_an_engine():
    run(OBJECTS, {})
