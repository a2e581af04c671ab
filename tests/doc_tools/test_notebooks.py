"""What `make notebook-outputs` writes."""

from base64 import b64decode, b64encode
from io import BytesIO

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from doc_tools.notebooks import with_small_pictures
from fairkv_jax.viz.heads import head_maps


def decoded(png: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(b64decode(png))).convert("RGB"), int)


def test_pictures_get_smaller_and_look_the_same():
    buffer = BytesIO()
    head_maps({"map": np.arange(1, 61).reshape(20, 3)}).savefig(buffer, format="png")
    png = b64encode(buffer.getvalue()).decode()
    output = new_output("display_data", {"image/png": png, "text/plain": "<Figure>"})
    notebook = new_notebook(
        cells=[new_code_cell("draw()", outputs=[output])],
        metadata={"widgets": {"state": {"outputs": [{"data": {"image/png": png}}]}}},
    )
    small = with_small_pictures(notebook)
    nbformat.validate(small)
    (state,) = small.metadata.widgets["state"]["outputs"]
    data = small.cells[0].outputs[0].data
    assert data["text/plain"] == "<Figure>"
    for found in (data["image/png"], state["data"]["image/png"]):
        assert len(found) < len(png) / 2
        assert np.abs(decoded(found) - decoded(png)).mean() < 1
