"""The book of a training: phases, resumes, damage."""

from __future__ import annotations

import pytest

from robustflat.errors import UserError
from robustflat.loggers.ledger import LedgerLogger, read_ledger


class Meter:
    """Totals that a test sets."""

    def __init__(self) -> None:
        self.now = {"forwards": 0, "backwards": 0, "images": 0, "peak_memory_mib": 1.0}

    def __call__(self):
        return dict(self.now)

    def add(self, forwards, backwards, images, peak=1.0):
        for name, value in zip(("forwards", "backwards", "images"), (forwards, backwards, images), strict=True):
            self.now[name] += value
        self.now["peak_memory_mib"] = peak


def test_what_was_spent_goes_to_the_phase_that_logs(tmp_path):
    meter = Meter()
    ledger = LedgerLogger(tmp_path / "ledger.json", meter)
    ledger.rewind(0)
    meter.add(10, 8, 640)
    ledger.log({"train/loss": 1.0}, step=50)
    meter.add(10, 8, 640, peak=7.0)
    ledger.log({"epoch": 1, "epoch/loss": 1.0}, step=100)
    meter.add(3, 1, 30, peak=5.0)
    ledger.log({"evaluation/test_error": 0.5}, step=100)
    meter.add(20, 16, 1280)
    ledger.log({"epoch": 2}, step=200)
    book = read_ledger(tmp_path / "ledger.json")
    assert {k: book["training"][k] for k in ("forwards", "backwards", "images", "peak_memory_mib")} == {
        "forwards": 40, "backwards": 32, "images": 2560, "peak_memory_mib": 7.0,
    }  # fmt: skip
    assert (book["watching"]["forwards"], book["watching"]["peak_memory_mib"]) == (3, 5.0)
    assert book["training"]["seconds"] > 0


def test_a_resumed_training_adds_and_a_new_one_begins_anew(tmp_path):
    for step, expected in ((0, 10), (100, 20), (0, 10)):
        meter = Meter()
        meter.add(99, 99, 99)  # of before the training
        ledger = LedgerLogger(tmp_path / "ledger.json", meter)
        ledger.rewind(step)
        meter.add(10, 1, 1)
        ledger.log({"epoch": 1}, step=1)
        assert read_ledger(tmp_path / "ledger.json")["training"]["forwards"] == expected


@pytest.mark.parametrize(("status", "expected"), [("stopped", 17), ("interrupted", 10), ("failed", 10), ("done", 10)])
def test_what_a_stopped_training_saved_in_the_middle_of_an_epoch_counts(tmp_path, status, expected):
    meter = Meter()
    ledger = LedgerLogger(tmp_path / "ledger.json", meter)
    ledger.rewind(0)
    meter.add(10, 1, 1)
    ledger.log({"epoch": 1}, step=10)
    meter.add(7, 1, 1)  # of epoch 2
    ledger.finish(status)
    assert read_ledger(tmp_path / "ledger.json")["training"]["forwards"] == expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"training": 3}', '{"training": {"forwards": "many"}}'])
def test_a_damaged_book_is_empty(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    assert read_ledger(tmp_path / "ledger.json") == {}


def test_a_folder_that_is_gone_is_a_sentence(tmp_path):
    meter = Meter()
    ledger = LedgerLogger(tmp_path / "gone" / "ledger.json", meter)
    with pytest.raises(UserError, match=r"cannot write .*ledger\.json"):
        ledger.log({"epoch": 1}, step=1)
