"""docs/server.md says what the code serves and refuses."""

import pytest

from fairkv_jax.serve import unsupported
from fairkv_jax.serve.reference import BEGIN, END, with_reference
from tests.serve.live import ROOT


def test_the_reference_is_current():
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    assert page == with_reference(page), "docs/server.md is stale: run `make server-reference`"


def test_what_stands_between_the_markers_is_replaced():
    page = with_reference(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page.startswith(f"before\n{BEGIN}\n\n## Routes\n")
    assert page.endswith(f"{END}\nafter\n")
    assert "old\n" not in page
    for name in (*unsupported.CHAT, *unsupported.WITHOUT_EFFECT, *unsupported.PATHS):
        assert f"| `{name}` |" in page
    assert "| `POST /v1/chat/completions` |" in page
    assert "| `n` | integer, 1 to 128 |" in page
    with pytest.raises(ValueError, match="needs the lines"):
        with_reference("no markers")
