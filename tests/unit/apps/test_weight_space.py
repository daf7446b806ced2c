"""Curvature and landscapes of a run folder, for reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from robustflat.apps.weight_space import curvature_of, landscapes_of
from robustflat.store.results import KEY, ResultStore


def row(checkpoint: str, measure: str, metric: str, value: float) -> dict[str, object]:
    return {
        "kind": "hessian",
        "checkpoint": checkpoint,
        "measure": measure,
        "metric": metric,
        "value": value,
        "count": 8,
    }


def test_the_clean_spectrum_of_the_checkpoint_counts() -> None:
    rows = [
        row("last", "frozen", "lambda_max", 9.0),
        row("last", "clean", "lambda_max", 3.0),
        row("last", "clean", "trace", 5.0),
        row("epoch_0005", "clean", "lambda_max", 7.0),
    ]
    found = curvature_of(rows, "last")
    assert (found["value"], found["trace"], found["loss"], found["examples"]) == (3.0, 5.0, "clean", 8)
    assert curvature_of(rows, "early_stopped") == {}


def test_other_matrices_are_not_the_hessian() -> None:
    others = [row("last", "clean_gauss_newton", "lambda_max", 9.0), row("last", "frozen", "lambda_max", 5.0)]
    found = curvature_of([*others, row("last", "clean~3758c46c", "lambda_max", 3.0)], "last")
    assert (found["value"], found["loss"]) == (3.0, "clean")
    assert curvature_of(others, "last")["loss"] == "frozen"
    assert curvature_of(others[:1], "last") == {}


def test_figures_of_one_set_of_examples_are_not_mixed_with_those_of_another() -> None:
    splits = {"test[:8]": 3.0, "test[:16]": 4.0, "train[:16]": 5.0}
    rows = [{**row("last", "clean", "lambda_max", value), "split": split, "count": int(split[6:-1].strip(":"))}
            for split, value in splits.items()]  # fmt: skip
    rows.append({**row("last", "clean", "trace", 9.0), "split": "train[:16]"})
    found = curvature_of(rows, "last")
    assert (found["value"], found["examples"]) == (4.0, 16) and "trace" not in found


def test_lines_are_read_and_planes_and_other_checkpoints_are_not(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.h5")
    lines = {
        "steps": np.linspace(-1, 1, 3),
        "losses": np.ones((2, 3)),
        "errors": np.zeros((2, 3)),
        "factors": np.ones(2),
    }
    about = {"kind": "landscape", "settings": "{}", KEY: "abc"}
    store.write("last/test[:8]/landscape/random", lines, {**about, "shape": "lines"})
    store.write("last/test[:8]/landscape/flat", lines, {**about, "shape": "plane"})
    store.write("epoch_0005/test[:8]/landscape/other", lines, {**about, "shape": "lines"})
    found = landscapes_of(tmp_path, "last")
    assert list(found) == ["random"]
    np.testing.assert_allclose(found["random"].losses.numpy(), 1.0)


def test_a_folder_without_results_has_none(tmp_path: Path) -> None:
    assert landscapes_of(tmp_path, "last") == {}
