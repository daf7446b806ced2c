"""Decomposition, onset on synthetic curves, and comparison at equal cost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from robustflat.errors import UserError
from robustflat.reporting.columns import columns, quantity
from robustflat.reporting.decomposition import (
    compared_at_cost,
    decomposed,
    history_at_cost,
    overfitting_onset,
    training_cost,
)
from robustflat.reporting.paper import from_paper
from robustflat.reporting.records import RunRecord
from robustflat.store.tables import tidy


def curve(values: list[float] | np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"epoch": np.arange(1, len(values) + 1), "test/robust_loss": values})


def run(
    label: str, value: float, cost: int, history: pd.DataFrame | None = None, *, train: float | None = None
) -> RunRecord:
    row = {"run_id": label, "checkpoint": "last", "kind": "attack", "measure": "pgd20"}
    values = {"test": value} | ({} if train is None else {"train": train})
    table = tidy([{**row, "split": s, "metric": "robust_loss", "value": v, "stderr": 0.1} for s, v in values.items()])
    ledger = pd.DataFrame(
        [("train", cost, cost, 10, 1.0, 10.0, 5.0), ("evaluate", 999, 999, 1, 1.0, 1.0, 1.0)],
        columns=["phase", "forwards", "backwards", "images", "seconds", "images_per_second", "peak_memory_mib"],
    )
    return RunRecord(
        label,
        label,
        label,
        label,
        0,
        "done",
        table,
        ledger=ledger,
        history=pd.DataFrame() if history is None else history,
    )


def test_parts_add_up() -> None:
    frame = decomposed(from_paper()).set_index("label")
    assert frame.loc["AT (baseline)", ["gap", "after_best"]].tolist() == pytest.approx([3.91 - 0.19, 3.91 - 1.53])
    assert (frame["note"] == "").all()
    both = decomposed([run("b", 2.0, 1, train=1.5)])
    assert both["gap"].item() == 0.5 and both["gap_stderr"].item() == pytest.approx(0.1 * 2**0.5)
    alone = decomposed([run("a", 2.0, 1)])
    assert alone["note"].item() == "not evaluated on train; no early-stopped network" and math.isnan(
        alone["gap"].item()
    )
    assert decomposed([]).empty
    with pytest.raises(UserError, match="without split"):
        decomposed([], "robust_loss (train)")


def test_onset_of_a_kinked_curve() -> None:
    values = np.concatenate([np.linspace(3, 1.5, 60), np.linspace(1.5, 4, 90)])
    found = overfitting_onset(curve(values), share=0.0)
    assert found.best_epoch == 60 and found.epoch in (60, 61)
    later = overfitting_onset(curve(values))
    assert later.epoch is not None and found.epoch < later.epoch <= 70
    assert later.rise == pytest.approx(2.5, abs=0.1) and "after epoch" in str(later)


def test_onset_is_of_the_final_rise() -> None:
    values = [2, 1.5, 2.5, 2.6, 2.5, 1.5, 1.4, 1.4, 1.5, 2.0, 2.5, 3.0]
    found = overfitting_onset(curve(values), window=1)
    assert found.epoch == 9


def test_one_outlier_is_no_onset() -> None:
    values = np.concatenate([np.linspace(3, 1.5, 50), [0.1], np.full(50, 1.5), np.linspace(1.5, 3, 50)])
    assert (overfitting_onset(curve(values)).epoch or 0) >= 100


@pytest.mark.parametrize(
    ("history", "why"),
    [
        (pd.DataFrame(), "no values"),
        (curve([1.0, 2.0]), "too few"),
        (curve([math.nan] * 5), "0 evaluated epochs"),
        (curve([3.0, 2.0, 1.5, 1.2, 1.1]), "above its lowest"),
        (curve([1.0] * 6), "above its lowest"),
    ],
)
def test_no_onset_for_a_reason(history: pd.DataFrame, why: str) -> None:
    found = overfitting_onset(history)
    assert found.epoch is None and why in found.why and why in str(found)


def test_epochs_without_evaluation_are_skipped() -> None:
    values = np.where(np.arange(1, 101) % 5 == 0, np.abs(np.arange(1, 101) - 50) / 10 + 1, np.nan)
    assert overfitting_onset(curve(values), window=1, share=0.0).epoch == 50
    with pytest.raises(UserError, match="odd"):
        overfitting_onset(curve([1.0]), window=2)


def test_equal_cost() -> None:
    runs = [run("cheap", 2.0, 100), run("same", 1.5, 105), run("dear", 1.0, 300), run("bad", 3.0, 400)]
    frame = compared_at_cost([*runs, replace(runs[0], label="unknown", ledger=pd.DataFrame())]).set_index("label")
    assert frame["cost"].tolist()[:4] == [200, 210, 600, 800]
    assert frame["equal_cost"].tolist()[:4] == [True, True, False, False] and pd.isna(frame["equal_cost"].iloc[4])
    assert frame.loc["same", "difference"] == pytest.approx(-0.5) and math.isnan(frame.loc["dear", "difference"])
    assert frame["efficient"].tolist() == [True, True, True, False, False]
    assert frame.loc["unknown", "note"] == "no compute ledger"
    equal = compared_at_cost([run("a", 2.0, 100), run("dearer", 2.0, 101), run("twin", 2.0, 100)]).set_index("label")
    assert equal["efficient"].to_dict() == {"a": True, "twin": True, "dearer": False}
    assert compared_at_cost([]).empty
    assert training_cost(runs[0], "seconds") == 1.0 and math.isnan(training_cost(runs[0], phases=["attack"]))
    with pytest.raises(UserError, match="cheap"):
        compared_at_cost(runs, reference="nobody")


def test_curves_stopped_at_the_same_cost() -> None:
    short, long = curve(np.linspace(3, 2, 10)), curve(np.linspace(3, 1, 10))
    frame = history_at_cost([run("a", 2.0, 100, short), run("b", 1.0, 200, long), run("c", 1.0, 200)])
    assert frame["epoch"].tolist()[:2] == [10, 5] and pd.isna(frame["epoch"].iloc[2])
    assert frame["value"].iloc[1] == pytest.approx(long["test/robust_loss"].iloc[4])
    assert "no history" in frame["note"].iloc[2]
    unplaced = history_at_cost([run("d", 1.0, 100, short.drop(columns="epoch"))])
    assert "no history" in unplaced["note"].item()


def test_names_of_quantities() -> None:
    assert quantity("robust_loss") == (None, "robust_loss", "test", "last")
    assert quantity("pgd20 robust_loss (cifar100 test) @epoch_0005") == (
        "pgd20",
        "robust_loss",
        "cifar100 test",
        "epoch_0005",
    )
    assert quantity("robust_loss (gap)") == quantity("robust_loss_gap")
    with pytest.raises(UserError, match="no quantity"):
        quantity("a b c d")


def test_columns_of_runs_with_gaps() -> None:
    one, failed = run("a", 2.0, 1), RunRecord("b", "b", "b", "b", None, "failed", pd.DataFrame())
    frame = columns([one, failed], y="robust_loss", x="average flatness")
    assert frame["y"].tolist()[0] == 2.0 and frame["y_stderr"].tolist()[0] == 0.1
    assert frame[["x", "y"]].isna().sum().tolist() == [2, 1] and pd.isna(frame["seed"].iloc[1])
    with pytest.raises(UserError, match="pgd20, autoattack"):
        columns(from_paper(), y="robust_error")
    with pytest.raises(UserError, match="label"):
        columns([], label="robust_loss")
    assert columns([], y="robust_loss").empty
