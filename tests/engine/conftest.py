"""What tests of the engine share."""

from collections.abc import Iterator

import pytest

from fairkv_jax import LLM
from fairkv_jax.engine.llm_engine import LLMEngine
from tests.engine.drive import check_idle


@pytest.fixture
def engine(llm: LLM) -> Iterator[LLMEngine]:
    """The engine of the file's own `llm`, idle before and after every test."""
    check_idle(llm.engine)
    yield llm.engine
    check_idle(llm.engine)
