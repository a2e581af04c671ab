"""What the pictures draw: the data that they are given, under titles that state what it shows."""

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from fairkv_jax.viz.curves import Curve, bars, curves, timeline
from fairkv_jax.viz.devices import layer_packing, page_map, slot_map, waiting
from fairkv_jax.viz.heads import gini, head_maps, lorenz, lorenz_curve
from fairkv_jax.viz.palette import PALETTE
from fairkv_jax.viz.style import save_svg
from fairkv_jax.viz.tokens import kept_fraction, kept_positions, kept_text

KEPT = np.array([[1.0, 3.0], [2.0, 2.0]])


def axes_of(figure) -> list[Any]:
    """The axes of a figure, whose artists have the types that the pictures draw."""
    return figure.axes


def title_of(figure) -> str:
    return " ".join(figure.get_suptitle().split())


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_head_maps_share_one_scale_and_name_the_most_uneven():
    figure = head_maps({"even": np.ones((2, 2)), "uneven": KEPT})
    even, uneven = axes_of(figure)[:2]
    assert np.asarray(even.images[0].get_array()) == pytest.approx(np.ones((2, 2)))
    assert np.asarray(uneven.images[0].get_array()) == pytest.approx(KEPT / 2)
    assert even.images[0].get_clim() == uneven.images[0].get_clim() == (0, 1.5)
    # The largest heads hold 1.5 and 1 times the means of their layers.
    assert title_of(figure).startswith("uneven")
    assert "1.2 times" in title_of(figure)


def test_head_maps_of_other_quantities_say_what_they_show():
    figure = head_maps({"scores": KEPT, "none": np.eye(2)}, "scored", label="score / mean")
    *maps, bar = axes_of(figure)
    assert [ax.get_title(loc="left") for ax in maps] == ["scores", "none"]
    assert bar.get_ylabel() == "score / mean"
    assert title_of(figure) == "scored"


def test_the_lorenz_curve_orders_heads_by_what_they_keep():
    heads, tokens = lorenz_curve(np.array([[4.0, 1.0], [2.0, 3.0]]))
    assert heads == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert tokens == pytest.approx([0, 0.1, 0.3, 0.6, 1])
    figure = lorenz({"equal": np.ones(4), "skewed": np.array([4.0, 1.0, 2.0, 3.0])})
    assert "skewed: half of the heads hold 30%" in title_of(figure)
    drawn = axes_of(figure)[0].lines[2]
    assert drawn.get_ydata() == pytest.approx(tokens)
    assert "Gini 0.25" in str(drawn.get_label())


def test_gini_is_0_for_equal_heads_and_near_1_if_one_keeps_all():
    assert gini(np.ones(7)) == pytest.approx(0)
    assert gini(np.eye(100)[0]) == pytest.approx(0.99)


def test_every_device_works_and_waits_as_long_as_the_step_takes():
    load = np.array([[3.0, 1.0], [2.0, 4.0]])  # the step takes 3 + 4
    figure = waiting({"plan": load, "even": np.ones((1, 2))})
    works, waits = axes_of(figure)[0].containers
    assert [bar.get_height() for bar in works] == [5, 5]
    assert [bar.get_y() + bar.get_height() for bar in waits] == [7, 7]
    assert "29% of the time with plan, 0% with even" in title_of(figure)


def test_a_layers_blocks_are_the_shares_of_its_heads():
    shares = np.array([[1.0, 0.0], [0.25, 0.75]])
    figure = layer_packing({"static": np.eye(2), "fair": shares}, [100.0, 400.0])
    assert "400 tokens with static, 300 with fair" in title_of(figure)
    fair = axes_of(figure)[1]
    heights = [[bar.get_height() for bar in container] for container in fair.containers]
    assert heights == [[100, 0], [100, 300]]
    assert texts(fair) == ["0", "1 25%", "1 75%"]


def test_slots_show_their_heads_and_lengths():
    heads = np.array([[[0, 1], [1, -1]]])
    lengths = np.array([[[5, 0], [7, 0]]])
    figure = slot_map(heads, lengths)
    assert texts(axes_of(figure)[0]) == ["head 0\n5", "head 1\n0"]
    assert texts(axes_of(figure)[1]) == ["head 1\n7", "empty"]
    assert "2 of 3 slots" in title_of(figure)


def test_pages_have_the_colours_of_their_owners():
    owners = np.array([[0, -1, 1]])
    figure = page_map(owners, ["row 0", "row 1"], "two rows", width=2)
    cells = axes_of(figure)[0].collections[0].get_array()
    assert cells.tolist() == [[0, None], [1, None]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["row 0", "row 1"]


def test_legends_of_long_names_stay_within_the_picture():
    names = [f"row {row} of some request with a long name" for row in range(5)]
    figure = page_map(np.arange(5)[None], names, "rows", width=5)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    legend = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert legend.x1 <= figure.bbox.x1


def test_a_curve_has_the_same_colour_in_all_panels():
    line = Curve(np.array([1024.0, 2048.0]), np.array([1.0, 2.0]))
    panels = {"first": {"a": line, "b": line}, "second": {"b": line}}
    figure = curves(panels, "b", x_label="x", y_label="y", log_x=2, reference=(1.0, "static"))
    first, second = axes_of(figure)
    assert to_hex(first.lines[1].get_color()) == to_hex(second.lines[0].get_color()) == PALETTE[1]
    assert second.lines[0].get_ydata().tolist() == [1, 2]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "static"]
    figure.draw_without_rendering()
    assert "2k" in [label.get_text() for label in first.get_xticklabels()]


def test_unused_panels_are_left_out_and_intervals_are_drawn():
    line = Curve(np.arange(2), np.ones(2), low=np.zeros(2), high=np.full(2, 2.0))
    figure = curves(
        {name: {"x": line} for name in "abcd"}, "t", x_label="x", y_label="y", columns=3
    )
    assert [ax.get_title(loc="left") for ax in axes_of(figure)] == ["a", "b", "c", "d"]
    area = axes_of(figure)[0].collections[0].get_paths()[0].vertices
    assert (area[:, 1].min(), area[:, 1].max()) == (0, 2)


def test_intervals_of_a_few_choices_stand_side_by_side():
    line = Curve(np.arange(2), np.array([0.5, 1]), low=np.zeros(2), high=np.ones(2))
    lines = {"a": line, "b": line}
    figure = curves({"p": lines}, "t", x_label="x", y_label="y", x_ticks={0: "10%", 1: "all"})
    ax = axes_of(figure)[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10%", "all"]
    starts = [each.get_segments()[0] for each in ax.collections]
    assert [segment[:, 1].tolist() for segment in starts] == [[0, 1], [0, 1]]
    assert starts[0][0, 0] == pytest.approx(-starts[1][0, 0])
    assert starts[0][0, 0] < 0
    assert [each.get_xdata()[0] for each in ax.lines] == [each[0, 0] for each in starts]


def test_bars_and_timelines_show_their_values():
    figure = bars({"one": 0.25, "two": 1.0}, "t", y_label="y", percent=True)
    assert texts(axes_of(figure)[0]) == ["25%", "100%"]
    figure = timeline(np.arange(3), {"load": {"a": np.array([1, 2, 3])}}, "rising")
    assert axes_of(figure)[0].lines[0].get_ydata().tolist() == [1, 2, 3]
    assert title_of(figure) == "rising"
    assert axes_of(figure)[0].get_legend() is None


def test_a_timelines_legend_covers_no_line():
    lines = {"running": np.array([0, 10, 10]), "waiting": np.array([10, 10, 10])}
    figure = timeline(np.arange(3), {"requests": lines}, "all run")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (ax,) = axes_of(figure)
    legend = ax.get_legend().get_window_extent(canvas.get_renderer())
    assert legend.y0 >= ax.bbox.y1


def test_kept_tokens_count_the_heads_that_keep_them():
    positions = [[np.array([0, 2]), np.array([0])], [np.array([0, 1]), np.array([2])]]
    fraction = kept_fraction(positions, 4)
    assert fraction.tolist() == [0.75, 0.25, 0.5, 0]
    html = kept_text(["<s>", "a", "b", "\n"], fraction, "kept & lost")
    assert re.findall(r"114,178,([\d.]+)", html) == ["0.75", "0.25", "0.50", "0.00"]
    assert "&lt;s&gt;" in html
    ElementTree.fromstring(html)


def test_positions_are_averaged_in_bins_and_passages_are_marked():
    figure = kept_positions({"m": np.array([1.0, 0, 0, 0])}, {"needle": (1, 2)}, "t", bins=2)
    ax = axes_of(figure)[0]
    assert ax.images[0].get_array().tolist() == [[0.5, 0]]
    assert texts(ax) == ["needle"]
    assert ax.patches[0].get_x() == 1
    assert ax.patches[0].get_width() == 2


def test_titles_are_wrapped_to_the_picture():
    figure = bars({"a": 1}, "word " * 40, y_label="y")
    width = figure.get_size_inches()[0] * figure.dpi
    title = next(text for text in figure.texts if text.get_text() == figure.get_suptitle())
    assert title.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width < width


def test_svg_is_valid_and_the_same_every_time():
    first, second = (save_svg(lorenz({"a": KEPT})) for _ in range(2))
    assert first == second
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert "share of the heads" in first
