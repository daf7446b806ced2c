"""The logger that ignores everything and the one that passes everything on."""

from __future__ import annotations

import pytest

from robustflat.loggers.base import Many, Null


class Noting(Null):
    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[str, object]] = []
        self.fails = fails

    def log(self, metrics, *, step):
        self.calls.append(("log", (dict(metrics), step)))

    def summary(self, metrics):
        self.calls.append(("summary", dict(metrics)))

    def rewind(self, step):
        self.calls.append(("rewind", step))

    def finish(self, status):
        self.calls.append(("finish", status))
        if self.fails:
            raise RuntimeError("cannot close")


class Plain:
    """A logger of somebody else, with the two required methods only."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, metrics, *, step):
        self.calls.append("log")

    def finish(self, status):
        self.calls.append("finish")


def use(logger):
    logger.log({"a": 1.0}, step=3)
    logger.rewind(2)
    logger.summary({"b": 2.0})
    logger.finish("done")


def test_everything_reaches_all_loggers_that_can_take_it():
    one, two, plain = Noting(), Noting(), Plain()
    use(Many([one, plain, two]))
    expected = [("log", ({"a": 1.0}, 3)), ("rewind", 2), ("summary", {"b": 2.0}), ("finish", "done")]
    assert one.calls == two.calls == expected
    assert plain.calls == ["log", "finish"]


def test_all_are_closed_even_if_one_cannot_be():
    last = Noting()
    with pytest.raises(RuntimeError, match="cannot close"):
        Many([Noting(fails=True), last]).finish("failed")
    assert last.calls == [("finish", "failed")]


def test_null_takes_everything_in_silence(capsys):
    use(Null())
    assert capsys.readouterr().out == ""
