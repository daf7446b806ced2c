"""The table of models: means and errors over seeds computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from robustflat.reporting.models_table import models_table
from robustflat.reporting.records import Study
from tests.unit.reporting.made_up import record


def test_means_over_seeds_with_their_standard_errors_lowest_robust_error_first() -> None:
    losses = [1.0, 1.2, 1.7]
    runs = [record("a", "A", seed, 0.5, loss) for seed, loss in enumerate(losses)] + [record("b", "B", 0, 0.5, 0.5)]
    table = models_table(Study(title="", question="", runs=runs))
    assert list(table["model"]) == ["b", "a"]
    assert list(table["seeds"]) == [1, 3]
    error = np.std(losses, ddof=1) / math.sqrt(3)
    assert table["RLoss"][1] == f"{np.mean(losses):.3f} ± {error:.3f}"
    assert table["RLoss gap"][1] == f"{0.6 * np.mean(losses):.3f} ± {0.6 * error:.3f}"


def test_no_runs_give_an_empty_table() -> None:
    assert models_table(Study(title="", question="", runs=[])).empty


def test_a_number_that_some_seed_lacks_is_not_a_mean_over_the_seeds() -> None:
    whole, part = record("a", "A", 0, 0.5, 1.0), record("a", "A", 1, 0.5, 1.2)
    part = replace(part, table=part.table[part.table["checkpoint"] == "last"])
    runs = [replace(r, table=r.table[r.table["metric"] != "robust_error"]) if r is part else r for r in (whole, part)]
    assert list(models_table(Study(title="", question="", runs=runs))["RErr (%)"]) == [""]
