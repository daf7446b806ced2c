"""JSON lines: content, determinism, rewinding, torn lines, full disks."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest

from robustflat.errors import DataError, UserError
from robustflat.loggers import jsonl
from robustflat.loggers.jsonl import JsonlLogger, read_jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def lines(path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_hold_step_and_values_and_timings_go_beside(path):
    logger = JsonlLogger(path)
    logger.log({"train/loss": 0.5, "time/seconds": 1.25}, step=10)
    logger.log({"epoch": 1}, step=12)
    logger.finish("done")
    assert lines(path) == [{"step": 10, "train/loss": 0.5}, {"step": 12, "epoch": 1}]
    assert lines(path.with_name("timings.jsonl")) == [{"step": 10, "time/seconds": 1.25}]


def test_runs_that_differ_in_time_only_have_the_same_metrics_file(tmp_path):
    contents = []
    for seconds in (1.0, 2.0):
        path = tmp_path / str(seconds) / "metrics.jsonl"
        logger = JsonlLogger(path)
        logger.log({"train/loss": 1 / 3, "time/seconds": seconds}, step=1)
        logger.finish("done")
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_every_line_is_on_disk_before_the_run_ends(path):
    logger = JsonlLogger(path)
    logger.log({"a": 1.0}, step=1)
    assert lines(path) == [{"step": 1, "a": 1.0}]
    logger.finish("done")


def test_values_that_json_lacks_are_text_and_come_back_as_floats(path):
    logger = JsonlLogger(path)
    values = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.1 + 0.2}
    logger.log(values, step=1)
    logger.finish("failed")
    assert '"NaN"' in path.read_text()
    (row,) = read_jsonl(path)
    assert math.isnan(row.pop("a"))
    assert row == {"step": 1.0, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2}


def test_rewinding_forgets_later_steps_and_logging_goes_on(path):
    logger = JsonlLogger(path)
    for step in (1, 2, 3, 4):
        logger.log({"a": float(step), "time/s": 0.0}, step=step)
    logger.rewind(2)
    logger.log({"a": 30.0}, step=3)
    logger.finish("done")
    assert [line["a"] for line in lines(path)] == [1.0, 2.0, 30.0]
    assert [line["step"] for line in lines(path.with_name("timings.jsonl"))] == [1, 2]
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_rewinding_to_the_start_empties_the_file_and_an_absent_file_stays_absent(path):
    logger = JsonlLogger(path)
    logger.rewind(0)
    assert not path.exists()
    logger.log({"a": 1.0}, step=1)
    logger.rewind(0)
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 2, "a"', '{"step": 2, "a": 2.0}', "\x00\x00"])
def test_line_cut_off_by_a_crash_is_removed(path, torn):
    path.parent.mkdir()
    path.write_text('{"step": 1, "a": 1.0}\n' + torn)
    logger = JsonlLogger(path)
    logger.log({"a": 5.0}, step=2)
    logger.finish("done")
    assert lines(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 5.0}]


def test_full_disk_is_reported_in_a_sentence(path, monkeypatch):
    logger = JsonlLogger(path)
    monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left"):
        logger.log({"a": 1.0}, step=1)


def test_full_disk_while_rewinding_leaves_the_file(path, monkeypatch):
    logger = JsonlLogger(path)
    logger.log({"a": 1.0}, step=1)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        logger.rewind(0)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        JsonlLogger(tmp_path / "file" / "metrics.jsonl")


def test_metrics_may_not_be_called_like_the_timings(tmp_path):
    with pytest.raises(UserError, match=r"must not be called timings.jsonl"):
        JsonlLogger(tmp_path / "timings.jsonl")


def test_reading_leaves_a_torn_last_line_out_and_refuses_other_damage(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text('{"step": 1}\n{"st')
    assert read_jsonl(file) == [{"step": 1.0}]
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="is damaged"):
        read_jsonl(file)
    with pytest.raises(DataError, match="there is no metrics file"):
        read_jsonl(tmp_path / "absent.jsonl")
