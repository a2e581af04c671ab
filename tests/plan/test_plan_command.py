"""`python -m fairkv_jax.plan` from the profile's file to the plan's and the page."""

import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from fairkv_jax.plan import Plan, Profile
from fairkv_jax.plan.__main__ import main


@pytest.fixture
def profile_file(tmp_path):
    samples = np.random.default_rng(0).gamma(3, size=(6, 30, 3)) * 50
    profile = Profile.from_samples(samples, model="<SmolLM2-135M>", policy="ada_snapkv", budget=150)
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize("dash", ["-", "_"])
def test_writes_plan_and_page(profile_file, tmp_path, capsys, dash):
    output, page = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = [
        f"--profile={profile_file}", "--devices", "2", f"--row{dash}split", "proportional",
        f"--max{dash}extra{dash}replicas=1", "--output", str(output), "--report", str(page),
            "--simulate=12",
    ]  # fmt: skip
    assert main(arguments) == 0
    plan = Plan.from_json(output.read_text(encoding="utf-8"))
    assert (plan.row_split, plan.num_devices, plan.num_layers) == ("proportional", 2, 30)
    text = capsys.readouterr().out
    for part in ("static", "best_effort", "fair_copying, proportional", "12 simulated requests"):
        assert part in text
    html = page.read_text(encoding="utf-8")
    assert "&lt;SmolLM2-135M&gt;" in html
    assert not re.search(r"(src|href)=", html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    framed = len(re.findall('class="mark"', html))
    assert framed == int((plan.replicas().sum(2) > 1).sum())


def test_the_report_may_be_a_picture(profile_file, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "plan.svg"
    assert main([f"--profile={profile_file}", "--report", str(picture)]) == 0
    assert ElementTree.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fairkv_jax.viz.devices")
    monkeypatch.delitem(sys.modules, "fairkv_jax.viz.style")
    assert main([f"--profile={profile_file}", "--report", str(picture)]) == 1
    assert "pip install 'fairkv-jax[viz]', or give a name that ends in .html" in (
        capsys.readouterr().err
    )


def test_throughput_uses_the_hardwares_memory(profile_file, tmp_path):
    output = tmp_path / "plan.json"
    options = ["--objective=throughput", "--hardware=L4", "--output", str(output)]
    assert main([f"--profile={profile_file}", *options]) == 0
    plan = Plan.from_json(output.read_text(encoding="utf-8"))
    assert 23e9 < plan.device_bytes <= 24e9


def test_an_int8_cache_fits_more_rows(profile_file, tmp_path, capsys):
    batches = []
    for dtype, said in (("auto", "256 bytes per cached"), ("int8", "132 bytes per cached")):
        output, page = tmp_path / "plan.json", tmp_path / "plan.html"
        options = ["--objective=throughput", f"--kv-cache-dtype={dtype}", f"--report={page}"]
        assert main([f"--profile={profile_file}", *options, "--output", str(output)]) == 0
        batches.append(Plan.from_json(output.read_text(encoding="utf-8")).cost.batch)
        assert said in " ".join(capsys.readouterr().out.split())
        assert said in page.read_text(encoding="utf-8")
    assert batches[1] / batches[0] == pytest.approx(256 / 132, rel=0.01)


def test_the_deprecated_flag_still_works(profile_file, tmp_path, capsys):
    plans = []
    for flag in ("--max-copies=1", "--max-extra-replicas=1"):
        output = tmp_path / "plan.json"
        assert main([f"--profile={profile_file}", flag, "--output", str(output)]) == 0
        plans.append(output.read_text(encoding="utf-8"))
        warned = "--max_copies is deprecated, use --max_extra_replicas" in capsys.readouterr().err
        assert warned == (flag == "--max-copies=1")
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--profile is required"),
        (["--profile=missing.json"], "missing.json"),
        (["--profile=x", "--devises=2"], "devises"),
        (["--profile=x", "--strategy=best"], "best"),
        (["--profile=x", "extra"], "extra"),
        (["--profile={file}", "--max-slots=1"], "raise it to at least 2"),
    ],
)
def test_errors_are_one_line(profile_file, capsys, arguments, message):
    filled = [argument.format(file=profile_file) for argument in arguments]
    assert main(filled) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_help_lists_the_flags(capsys):
    assert main(["--help"]) == 0
    assert "--row_split" in capsys.readouterr().out
