"""launch/README.md names a test for every file beside it."""

import re

from tests.serve.live import ROOT

FOLDER = ROOT / "launch"


def test_every_file_has_a_test_that_names_it():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    tests = dict(re.findall(r"^\| `(\S+)` \| `(tests/\S+)` \|", text, re.MULTILINE))
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()} - {
        "README.md"
    }
    assert set(tests) == files
    starters = (ROOT / "tests" / "launch" / "routers.py").read_text(encoding="utf-8")
    for file, test in tests.items():
        name = file.rpartition("/")[2].removesuffix(".sh")
        assert name in starters + (ROOT / test).read_text(encoding="utf-8")
