"""Options declared as dataclass fields, and what derives from them."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
from absl import flags

from fairkv_jax.command_line import define_flag, normalise, string_list
from fairkv_jax.config import ENGINE_OPTIONS
from fairkv_jax.engine.llm import LLM
from fairkv_jax.options import (
    by_group,
    document_options,
    help_with_default,
    option,
    options_of,
    split_options,
    with_new_names,
)
from fairkv_jax.serve.option_table import BEGIN, END, PAGE, with_table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Oven:
    heat: int = option(
        180, "Degrees.", group="Heat", name="oven_heat", user_default=None, default_text="by dish"
    )
    mode: str = option(
        "fan", "Mode.", group="Heat", name="oven_mode", choices=("fan", "grill"), old_name="oven_m"
    )
    racks: tuple[str, ...] = option((), "Racks.", group="Racks")
    timer: float | None = option(None, "Minutes.", group="Heat")
    is_hot: bool = False


OVEN = options_of(Oven)
HEAT, MODE, RACKS, TIMER = OVEN


def test_types_and_names_come_from_the_fields():
    assert [each.name for each in OVEN] == ["oven_heat", "oven_mode", "racks", "timer"]
    assert [each.type for each in OVEN] == [int, str, tuple, float]
    assert [each.default for each in OVEN] == [None, "fan", (), None]
    assert (MODE.old_name, MODE.old_field) == ("oven_m", "m")
    assert [each.name for each in by_group(OVEN)["Heat"]] == ["oven_heat", "oven_mode", "timer"]
    assert Oven() == Oven(180, "fan", (), None)


def test_help_names_choices_and_defaults():
    assert help_with_default(HEAT) == "Degrees. Default: by dish."
    assert help_with_default(MODE) == "Mode. One of fan, grill. Default: fan."
    assert help_with_default(RACKS) == "Racks. Default: none."


def test_values_go_to_the_fields_and_none_leaves_the_choice_open():
    values = {"oven_heat": None, "oven_mode": "grill", "timer": None}
    assert split_options(values, Oven) == [{"mode": "grill"}]
    assert split_options({"oven_heat": 90, "oven_mode": None}, Oven) == [{"heat": 90, "mode": None}]


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"unknown option 'oven_head': did you mean 'oven_heat'\?"):
        split_options({"oven_head": 90}, Oven)
    with pytest.raises(TypeError, match="unknown option 'heat': did you mean"):
        split_options({"heat": 90}, Oven)
    with pytest.raises(TypeError, match="'zzz': use one of oven_heat, oven_mode, racks, timer"):
        split_options({"zzz": 1}, Oven)


def test_deprecated_names_become_the_new_ones():
    with pytest.warns(DeprecationWarning, match="oven_m is deprecated .*: use oven_mode") as caught:
        assert with_new_names({"oven_m": "grill", "x": 1}, OVEN) == {"x": 1, "oven_mode": "grill"}
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="oven_m is the deprecated name of oven_mode"):
        with_new_names({"oven_m": "grill", "oven_mode": "fan"}, OVEN)


def test_flags_carry_the_declared_type_default_and_help():
    values = flags.FlagValues()
    for each in OVEN:
        define_flag(each, flag_values=values)
    values(["oven", "--oven_heat=90", "--racks=a,b"])
    assert values.flag_values_dict() == {
        "oven_heat": 90,
        "oven_mode": "fan",
        "racks": "a,b",
        "timer": None,
    }
    assert values["oven_heat"].help == "Degrees. Default: by dish."
    assert values["oven_mode"].help == "<fan|grill>: Mode."
    with pytest.raises(flags.IllegalFlagValueError, match=r"one of <fan\|grill>"):
        values(["oven", "--oven_mode=boil"])


def test_arguments_get_new_names_but_values_are_unchanged(caplog: pytest.LogCaptureFixture):
    words = ["oven", "--oven-m", "oven-m", "--racks=--oven-m", "-v", "oven_m"]
    assert normalise(words, OVEN) == [
        "oven", "--oven_mode", "oven-m", "--racks=--oven-m", "-v", "oven_m"
    ]  # fmt: skip
    assert caplog.text.count("deprecated") == 1


def test_lists_of_strings():
    assert string_list("racks", " a, b,,") == string_list("racks", '["a", "b"]') == ("a", "b")
    with pytest.raises(ValueError, match=r"--oven-racks must be a list of strings, got \[1\]"):
        string_list("oven_racks", "[1]")


def test_docstrings_list_the_options():
    @document_options(Oven)
    class Kitchen:
        """A kitchen.

        {options}
        """

    assert Kitchen.__doc__ is not None
    assert "Heat:\n    oven_heat: Degrees. Default: by dish.\n" in Kitchen.__doc__
    documented = inspect.getdoc(LLM) or ""
    for each in ENGINE_OPTIONS:
        assert f"\n    {each.name}: " in documented


def test_readme_has_the_current_table():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert page == with_table(page), f"{PAGE} is stale: run `make option-table`"


def test_the_table_replaces_what_is_between_its_markers():
    page = with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page.startswith("before\n")
    assert page.endswith(f"\n{END}\nafter\n")
    assert "old\n" not in page
    assert "| `kv_policy` | `full`; server: `ada_snapkv` | " in page
    with pytest.raises(ValueError, match="needs the lines"):
        with_table("no markers")
