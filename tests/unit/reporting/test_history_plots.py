"""Learning curves and flatness over epochs: which runs and epochs are in them, and what is said about them."""

from __future__ import annotations

import re
from dataclasses import replace

import pandas as pd

from robustflat.apps.config import config_folder
from robustflat.reporting.drawing import Drawing, Line, Missing, Points
from robustflat.reporting.history_plots import flatness_over_epochs, landscapes, learning_curves
from robustflat.reporting.records import RunRecord, Study
from tests.unit.reporting.made_up import record


def run(label: str, losses: list[float], seed: int = 0, status: str = "done") -> RunRecord:
    """A run with a history of the robust loss on test examples."""
    history = pd.DataFrame({"epoch": range(1, len(losses) + 1), "test/robust_loss": losses})
    return record(label, "A", seed, 0.5, 2.0, run_id=f"{label}{seed}", history=history, status=status)


def curves(*runs: RunRecord) -> Drawing:
    found = learning_curves(Study("x", "?", runs))[0]
    assert isinstance(found, Drawing)
    return found


def test_runs_evaluated_once_do_not_shift_the_count_of_those_that_overfit() -> None:
    once, falling, rising = run("once", [2.0]), run("falling", [3.0, 2.0, 1.0]), run("rising", [2.0, 1.0, 3.0, 4.0])
    assert "1 of 2 are lowest before the last epoch" in curves(once, falling, rising).reading
    assert "0 of 1 are lowest" in curves(run("longer", [2.0]), falling).reading
    assert "1 of 1 are lowest" in curves(once, rising).reading


def test_a_seed_that_failed_does_not_cut_the_mean_short() -> None:
    runs = [run("a", [3.0, 2.0, 1.0]), run("a", [5.0, 4.0, 3.0], 1), run("a", [9.0], 2, "failed")]
    (line,) = (item for item in curves(*runs).items if isinstance(item, Line))
    assert (line.x, line.y) == ((1.0, 2.0, 3.0), (4.0, 3.0, 2.0))
    (alone,) = (item for item in curves(runs[2]).items if isinstance(item, Line))
    assert alone.y == (9.0,)  # better than nothing


def test_snapshots_of_failed_runs_do_not_count() -> None:
    whole = record("a", "A", 0, 0.5, 2.0)
    broken = replace(record("a", "A", 1, 50.0, 2.0), status="failed")
    average = flatness_over_epochs(Study("x", "?", [whole, broken]))[0]
    assert isinstance(average, Drawing)
    (points,) = (item for item in average.items if isinstance(item, Points))
    assert max(points.y) == 0.5


def test_hints_name_evaluations_that_there_are() -> None:
    bare = [replace(record("a", "A", 0, 0.5, 2.0), table=pd.DataFrame(), landscapes={})]
    absent = [*flatness_over_epochs(Study("x", "?", bare)), *landscapes(Study("x", "?", bare))]
    said = " ".join(item.reason for item in absent if isinstance(item, Missing))
    named = re.findall(r"evaluation=(\w+)", said)
    assert named and all((config_folder() / "evaluation" / f"{name}.yaml").is_file() for name in named)
