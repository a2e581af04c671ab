"""The notebooks: paired with their .py files, free of this machine's paths, and they run."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from doc_tools.notebooks import FOLDER, NOTEBOOKS, execute

MAX_KILOBYTES = 400


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_notebook_is_its_python_file_with_outputs(notebook: Path):
    """A change of one of the two, without the other, is found here."""
    written = nbformat.read(notebook.with_suffix(".ipynb"), as_version=4)
    source = jupytext.read(notebook)
    assert [(cell.cell_type, cell.source) for cell in written.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    code = [cell for cell in written.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2


def test_a_notebook_is_small(notebook: Path):
    """`make notebook-outputs` writes pictures with few colours."""
    assert notebook.with_suffix(".ipynb").stat().st_size <= 1000 * MAX_KILOBYTES


def test_links_of_a_notebook_lead_to_files(notebook: Path):
    cells = jupytext.read(notebook).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)", prose):
        assert (FOLDER / target).is_file(), target


def test_a_notebook_names_no_path_of_the_machine_that_ran_it(notebook: Path):
    text = notebook.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|var)/", text)


@pytest.mark.long
def test_a_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch):
    """It runs from its own folder, as in JupyterLab, with the package of this source tree."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # set by tests/conftest.py
        monkeypatch.delenv(name, raising=False)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/fairkv_jax"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache)
    code = [cell for cell in execute(notebook).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
