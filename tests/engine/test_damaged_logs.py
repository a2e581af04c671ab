"""Files that are no schedule logs, or damaged ones: each is refused with a sentence."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fairkv_jax.engine.schedule_log import ScheduleLog, read_log
from tests.engine.logged import EMPTY, HEADER


def header_record(tmp_path: Path) -> dict[str, Any]:
    ScheduleLog(tmp_path / "good", HEADER).close()
    return json.loads((tmp_path / "good").read_text())["header"]


@pytest.mark.parametrize(
    ("change", "line", "sentence"),
    [
        ({"format": 2}, "", "line 1: the log has format 2, this version reads 1: replay it with"),
        ({"plan": {}}, "", "line 1: the header is damaged"),
        ({"fingerprint": None, "surplus": 1}, "", "line 1: the header is damaged: .*surplus"),
        ({"engine_config": {"page_size": 3}}, "", "line 1: the header is damaged: .*page_size"),
        ({}, "no JSON", "line 2 is not an object with one key in JSON: this is not a schedule log"),
        ({}, "[" * 100_000, "line 2 is not an object"),
        ({}, "{}", "line 2 is not an object"),
        ({}, '"output"', "line 2 is not an object"),
        ({}, '{"header":{}}', "line 2: a log has one header, in its first line"),
        ({}, '{"news":{}}', "line 2: unknown entry 'news', it must be header, output, result"),
        ({}, '{"output":{"index":3}}', "line 2: the output is damaged: KeyError.*class"),
        ({}, '{"output":{"class":"Popen"}}', "line 2: the output is damaged: .*'Popen'"),
        ({}, '{"output":{"class":"DecodeRow"}}', "line 2: the output is damaged: .*position"),
        ({}, '{"output":[]}', "line 2: the output is damaged: .*list"),
        ({}, '{"result":[]}', "line 2: the result is damaged"),
    ],
)
def test_damaged_logs_are_refused_with_a_sentence(
    tmp_path: Path, change: dict[str, Any], line: str, sentence: str
):
    path = tmp_path / "log"
    header = json.dumps({"header": header_record(tmp_path) | change})
    path.write_text(f"{header}\n{line}\n" if line else f"{header}\n")
    with pytest.raises(ValueError, match=sentence) as raised:
        list(read_log(path))
    assert str(path) in str(raised.value)


def test_files_that_are_no_logs_are_refused(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary, line 1 is not an object with one key"):
        list(read_log(tmp_path / "binary"))
    (tmp_path / "headless").write_text('{"result":{}}\n')
    with pytest.raises(ValueError, match="a log has one header, in its first line; found 'result'"):
        list(read_log(tmp_path / "headless"))
    with pytest.raises(ValueError, match="missing cannot be read: No such file"):
        list(read_log(tmp_path / "missing"))


def test_an_incomplete_last_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    log = ScheduleLog(tmp_path / "log", HEADER)
    log.write_output(EMPTY)
    log.close()
    caplog.set_level(logging.WARNING)
    with (tmp_path / "log").open("a") as file:
        file.write('{"output":{"class":"Sched')
    assert len(list(read_log(tmp_path / "log"))) == 2
    assert "line 3: incomplete" in caplog.text
