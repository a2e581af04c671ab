"""Runs notebooks and writes them with their outputs: `make notebook-outputs`.

    python -m doc_tools.notebooks [NAME ...]

A notebook is a pair of files: notebooks/NAME.py, which is edited, and notebooks/NAME.ipynb, which
has the outputs as well. Pictures are stored with at most 256 colours, which makes them a third as
large.
"""

import os
import sys
import time
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
MINUTES = 12
"""The longest that a cell may take, also if nothing has been compiled yet."""


def execute(source: Path) -> Any:
    """Runs a notebook's .py file, from its folder as in JupyterLab, and returns the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    notebook = jupytext.read(source)
    client = NotebookClient(
        notebook,
        timeout=60 * MINUTES,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute()
    return notebook


def with_small_pictures(part: Any) -> Any:
    """Returns a notebook, or a part of one, whose PNG pictures have at most 256 colours."""
    if isinstance(part, list):
        return [with_small_pictures(each) for each in part]
    if not isinstance(part, dict):
        return part
    return type(part)(
        {
            key: _small(value) if key == "image/png" else with_small_pictures(value)
            for key, value in part.items()
        }
    )


def _small(png: str) -> str:
    picture = Image.open(BytesIO(b64decode(png))).convert("RGB")
    small = BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return b64encode(small.getvalue()).decode()


def main(names: list[str]) -> None:
    """Runs the named notebooks, or all of them, and writes their .ipynb files."""
    root = str(FOLDER.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.getenv("PYTHONPATH")])])
    for source in NOTEBOOKS:
        if not names or source.stem in names:
            began = time.perf_counter()
            notebook = with_small_pictures(execute(source))
            jupytext.write(notebook, source.with_suffix(".ipynb"))
            print(f"{source.stem}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
