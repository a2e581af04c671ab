"""The documentation: links lead somewhere, commands have the flags that they are shown with."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from doc_tools.reference import help_page, with_generated
from fairkv_jax.serve.prefixes import PrefixBody
from fairkv_jax.serve.protocol import ChatBody, CompletionBody

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()
)  # fmt: skip
CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m fairkv_jax\.(\w+)((?:\\\n|[^\n`|#])*)")
BENCHMARK = re.compile(r"python -m (benchmarks\.[\w.]*\w)((?:\\\n|[^\n`|#)])*)")
NEEDS_TORCH = "benchmarks.kvpress_parity.record"
SUBCOMMANDS = {
    "profile": ("measure", "learn", "import"),
    "checkpoint": ("fetch", "convert", "inspect"),
}
BODIES = {"chat/completions": ChatBody, "completions": CompletionBody, "prefixes": PrefixBody}


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings(page: Path):
    prose = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{ids(page)} links to {link}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{ids(page)} links to {link}"


@cache
def known_flags(command: str) -> set[str]:
    flags = re.findall(r"(?<![\w-])--(?:\[no\])?([a-z][\w-]*)", help_page(command))
    return {flag.replace("-", "_") for flag in flags} | {"help"}


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    found = []
    for module, rest in COMMAND.findall(page.read_text(encoding="utf-8")):
        words = shlex.split(rest.replace("\\\n", " ").replace("'", ""))
        if words and words[0] in SUBCOMMANDS.get(module, ()):
            module = f"{module} {words[0]}"
        flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"]
        found.append((module, flags))
    return found


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(f for _, f in commands_of(page))], ids=ids
)
def test_commands_have_the_flags_they_are_shown_with(page: Path):
    for command, flags in commands_of(page):
        unknown = [flag for flag in flags if flag.removeprefix("no_") not in known_flags(command)]
        assert not unknown, f"{ids(page)} shows {command} with {unknown}"


@pytest.mark.long
def test_benchmarks_have_the_flags_they_are_shown_with():
    shown: dict[str, set[str]] = {}
    for page in PAGES:
        for module, rest in BENCHMARK.findall(page.read_text(encoding="utf-8")):
            shown.setdefault(module, set()).update(re.findall(r"--([a-z][\w-]*)", rest))
    assert len(shown) > 10
    for module, flags in shown.items():
        if module == NEEDS_TORCH:
            continue
        program = [sys.executable, "-m", module, "--helpfull"]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
        known = set(re.findall(r"--(?:\[no\])?([a-z][\w-]*)", done.stdout))
        assert known, f"{module} has no help: {done.stderr[-1000:]}"
        unknown = {flag.replace("-", "_") for flag in flags} - {k.replace("-", "_") for k in known}
        assert not unknown, f"{module} is shown with {unknown}"


def test_bodies_sent_by_curl_are_valid():
    sent = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for route, body in re.findall(r"/v1/([a-z/]+)[^\n]* -d '(\{.*?\})'\n", text, re.DOTALL):
            BODIES[route].model_validate(json.loads(body))
            sent += 1
    assert sent


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_example_runs(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    small = example.replace("SmolLM2-135M-Instruct", str(tiny_checkpoint))
    small = small.replace("kv_budget=256", "kv_budget=64").replace("* 100", "* 4")
    assert small.count(str(tiny_checkpoint)) == small.count("* 4") == small.count("=64") == 1
    # The example sets XLA_FLAGS, which JAX has read by now, and other tests must not see.
    assert len(jax.devices()) == 8
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    names: dict[str, Any] = {}
    exec(small, names)
    lengths = names["output"].kv_lengths
    assert lengths.shape == (2, 3)
    assert lengths.mean() == pytest.approx(64, abs=1)
    assert "prompt tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("server options", "| `shutdown_timeout` | `25` | Seconds that running requests"),
        ("metrics", "| `fairkv:kv_load_max_over_mean` | gauge |"),
        ("help of chat", "--base_url"),
    ],
)
def test_tables_are_generated(name: str, row: str):
    page = with_generated(f"before\n\n<!-- generated: {name} -->\n\nafter")
    assert row in page
    assert page.startswith("before\n\n")
    assert page.endswith("\n\nafter")
    assert str(ROOT) not in page


def test_an_unknown_marker_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        with_generated("<!-- generated: nothing -->")
