"""The drawings say what the planner computes."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from doc_tools import figures
from fairkv_jax.plan import Profile, make_plan

PROFILE = Profile(
    model="", policy="ada_snapkv", budget=None, tokens=((600, 200, 100, 100), (200, 200, 200, 200))
)


def test_utilization_waits_for_the_fullest_device_in_every_layer():
    tokens = figures.device_tokens(PROFILE, make_plan(PROFILE, 2, "static"))
    assert tokens.sum(1).tolist() == [[800, 200], [400, 400]]
    assert figures.utilization(tokens) == pytest.approx((500 + 400) / (800 + 400))


def test_the_balance_figure_names_both_utilizations_and_draws_all_tokens():
    svg = figures.balance_figure(PROFILE, "M", "S", 2)
    assert "75% utilization over all layers" in svg
    heights: dict[bool, float] = {False: 0.0, True: 0.0}
    for bar in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        if bar.get("stroke") == "#ffffff":
            heights[float(bar.get("x", "0")) > 450] += float(bar.get("height", "0"))
    # Layer 1, whose fullest device fills 190 units: 400 tokens, of 800 in all.
    assert heights[False] == pytest.approx(heights[True], rel=0.01)
    assert any(np.isclose(heights[False], 190 * total / top, rtol=0.01) for total, top in
               ((800, 400), (1000, 800)))  # fmt: skip


@pytest.mark.parametrize(
    "draw", [figures.lengths_figure, figures.slots_figure, figures.prefix_figure]
)
def test_drawings_are_well_formed_and_have_titles(draw):
    root = ET.fromstring(draw())
    _, _, width, height = map(float, root.get("viewBox", "").split())
    assert root.get("aria-label")
    for rect in re.findall(r'x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', draw()):
        x, y, w, h = map(float, rect)
        assert x + w <= width
        assert y + h <= height
