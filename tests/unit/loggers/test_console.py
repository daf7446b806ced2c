"""Progress in the terminal and in files."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from robustflat.loggers.console import ConsoleLogger

TIMES = {"time/seconds": 10.0, "time/images_per_second": 1234.5, "time/seconds_left": 3725.0, "time/progress": 0.25}


@pytest.fixture
def stream():
    return io.StringIO()


def logger_for(stream, *, terminal: bool) -> ConsoleLogger:
    console = Console(file=stream, force_terminal=terminal, width=200, highlight=False)
    return ConsoleLogger(epochs=40, console=console)


def test_file_gets_one_line_per_epoch_and_none_per_step(stream):
    logger = logger_for(stream, terminal=False)
    logger.log({"train/loss": 1.0, "train/learning_rate": 0.1, **TIMES}, step=50)
    assert stream.getvalue() == ""
    logger.log({"epoch": 10, "epoch/loss": 1.2345, "epoch/error": 0.512, **TIMES}, step=100)
    logger.finish("done")
    assert stream.getvalue() == "epoch 10/40  loss 1.234  robust error 51.2%  1,234 images/s  1:02:05 left\n"


def test_evaluations_get_a_line_of_their_own_with_the_errors(stream):
    logger = logger_for(stream, terminal=False)
    logger.log({"evaluation/test_robust_error": 0.25, "evaluation/test_loss": 1.5, "time/seconds": 3.0}, step=7)
    logger.log({"flatness/average": 0.5}, step=8)
    assert stream.getvalue() == "step 7  test_robust_error 25.0%\nstep 8  flatness/average 0.500\n"


def test_only_timings_print_nothing(stream):
    logger_for(stream, terminal=False).log({"time/seconds": 3.0}, step=7)
    assert stream.getvalue() == ""


def test_terminal_shows_a_bar_that_is_gone_in_the_end(stream):
    logger = logger_for(stream, terminal=True)
    logger.log({"train/loss": 0.75, "train/error": 0.5, **TIMES}, step=50)
    logger._progress.refresh()
    assert "25%" in stream.getvalue()
    assert "loss 0.750  robust error 50.0%" in stream.getvalue()
    logger.finish("done")
    assert logger._progress is None
    logger.finish("done")


def test_square_brackets_are_no_markup(stream):
    logger_for(stream, terminal=False).log({"flatness[bold]": 1.0}, step=1)
    assert "flatness[bold] 1" in stream.getvalue()
