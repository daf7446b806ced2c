"""The printed results of Stutz et al., "Relating Adversarially Robust Generalization to Flat Minima", ICCV 2021.

`data/iccv21*.csv` hold the numbers as printed: errors in percent, losses in nats, flatness as rise of the loss. Column
names are <number>_<split>_<attack>, where "stop" is the early-stopped network on the test set, "pgd" is PGD-20 with 10
restarts and "aa" AutoAttack; avg_* and worst_* are average-case (radius 0.5) and worst-case flatness (radius 0.003) of
the clean cross-entropy (ce) or of the robust loss (rloss).
"""

from __future__ import annotations

import hashlib
import math
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from robustflat.errors import require_one_of
from robustflat.reporting.records import RunRecord

TABLES = ("models", "table1", "groups", "figure", "scale", "hessian", "robustbench")
"""The printed tables: all 74 models; Table 1 and its group means; RErr of the figure of landscapes; scaled networks;
eigenvalues of the Hessian of the clean loss; networks of RobustBench."""

GOOD, POOR = 0.57, 0.60
"""Robust error under AutoAttack below which a network is "good", and from which on it is "poor"."""

EXAMPLES = 1000
"""Robust errors, robust losses and flatness are on the first 1000 test (or training) examples."""

EPSILON = 8 / 255
SOURCE = "Stutz et al., ICCV 2021"

# Printed column -> (kind, measure, metric). Errors become fractions. The loss on AutoAttack's images is left out: it
# stops at the first image that fools the network, so that its losses say nothing.
_ATTACKED = {
    "rerr_{}_pgd": ("attack", "pgd20", "robust_error"),
    "rloss_{}_pgd": ("attack", "pgd20", "robust_loss"),
    "rerr_{}_aa": ("attack", "autoattack", "robust_error"),
}
_CLEAN = {"err_{}": ("clean", "clean", "error"), "ce_{}": ("clean", "clean", "loss")}
_FLATNESS = {
    "avg_rloss": ("average", 0.5, "robust"),
    "worst_rloss": ("worst", 0.003, "robust"),
    "avg_ce": ("average_clean", 0.5, "clean"),
    "worst_ce": ("worst_clean", 0.003, "clean"),
}
_FLOATS = ("radius", "value", "stderr", "low", "high", "epsilon")
_INTEGERS = ("seed", "epoch", "count")


def printed(table: str = "models") -> pd.DataFrame:
    """A printed table, numbers as in the paper (errors in percent).

    Args:
        table: one of `TABLES`. "models" has the columns model (the row's name), experiment (the file in
            conf/experiment/iccv21), family (the method) and table1 (the row's name in Table 1, "" if not in it), then
            numbers; see the module.

    Raises:
        UserError: for another name.
    """
    require_one_of("A table of the paper", table, TABLES)
    name = "iccv21.csv" if table == "models" else f"iccv21_{table}.csv"
    with (resources.files("robustflat.reporting") / "data" / name).open(encoding="utf-8") as file:
        return pd.read_csv(file, keep_default_na=False)


def from_paper() -> list[RunRecord]:
    """The 74 networks of the paper as records, in the order of the table (by robust error under AutoAttack).

    `experiment` is the name that our own run of the row gets ("iccv21-at"), `label` the row's name. Numbers carry the
    names of our evaluation (`conf/evaluation/paper.yaml`): "pgd20 robust_loss", "autoattack robust_error",
    "average flatness", "worst flatness", and "average_clean", "worst_clean" for the clean loss. Errors are fractions
    with the binomial standard error of 1000 examples, which is ours; the paper prints no uncertainty. Clean numbers
    have no count: the paper does not say on how many examples they are.
    """
    rows = printed().to_dict("records")
    made = [_rows(row) for row in rows]
    # One frame cut into pieces: 74 frames made one by one take a second.
    table, ends = _typed([line for lines in made for line in lines]), np.cumsum([len(lines) for lines in made])
    pieces = [table.iloc[end - len(lines) : end].reset_index(drop=True) for end, lines in zip(ends, made, strict=True)]
    return [_record(row, piece) for row, piece in zip(rows, pieces, strict=True)]


def _name(row: dict[Any, Any]) -> dict[str, str]:
    """Experiment and run id of a row."""
    experiment = f"iccv21-{row['experiment']}"
    return {"run_id": hashlib.sha256(f"paper/{experiment}".encode()).hexdigest()[:8], "experiment": experiment}


def _record(row: dict[Any, Any], table: pd.DataFrame) -> RunRecord:
    name = _name(row)
    return RunRecord(
        run_id=name["run_id"],
        experiment=name["experiment"],
        label=str(row["model"]),
        family=str(row["family"]),
        seed=None,
        status="done",
        table=table,
        provenance={"source": SOURCE, "table": "supplement, all models"},
        early_stopped="early_stopped",
        part="average" if str(row["experiment"]).startswith("weight_averaging") else "model",
    )


def _rows(row: dict[Any, Any]) -> list[dict[str, Any]]:
    rows = []
    for place, split, checkpoint in (
        ("test", "test", "last"),
        ("train", "train", "last"),
        ("stop", "test", "early_stopped"),
    ):
        for name, (kind, measure, metric) in _ATTACKED.items():
            rows.append(_attacked(row[name.format(place)], kind, measure, metric)
                        | {"split": f"{split}[:{EXAMPLES}]", "checkpoint": checkpoint})  # fmt: skip
        for name, (kind, measure, metric) in _CLEAN.items() if checkpoint == "last" else ():
            value = row[name.format(place)] / (100 if metric == "error" else 1)
            rows.append(_row(kind, measure, metric, value) | {"split": split, "checkpoint": checkpoint})
    for name, (measure, radius, loss) in _FLATNESS.items():
        rows.append(_row("flatness", measure, "flatness", row[name]) | _THREAT
                    | {"radius": radius, "loss": loss, "protocol": "paper", "count": EXAMPLES}
                    | {"split": f"test[:{EXAMPLES}]", "checkpoint": "last"})  # fmt: skip
    gap = round(row["rloss_test_pgd"] - row["rloss_train_pgd"], 2)
    rows.append(_row("attack", "pgd20", "robust_loss_gap", gap) | _THREAT
                | {"split": "test - train", "checkpoint": "last", "count": EXAMPLES})  # fmt: skip
    return [line | _name(row) for line in rows]


_THREAT = {"norm": "linf", "epsilon": EPSILON}


def _attacked(value: float, kind: str, measure: str, metric: str) -> dict[str, Any]:
    if metric == "robust_loss":
        return _row(kind, measure, metric, value) | _THREAT | {"count": EXAMPLES}
    share = value / 100
    made = _row(kind, measure, metric, share) | _THREAT
    return made | {"count": EXAMPLES, "stderr": math.sqrt(share * (1 - share) / EXAMPLES)}


def _row(kind: str, measure: str, metric: str, value: float) -> dict[str, Any]:
    """A row with all columns of the tidy table; what the paper does not say is missing."""
    unknown = dict.fromkeys(("seed", "epoch", "radius", "stderr", "low", "high", "count"))
    nothing = dict.fromkeys(("norm", "epsilon", "loss", "protocol", "precision"))
    about = {"checkpoint": "last", "split": "", "kind": kind, "measure": measure, "metric": metric}
    return {**unknown, **nothing, **about, "value": value, "version": SOURCE, "key": ""}


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows with the columns and types of the tidy tables of `store`, which this room does not import."""
    names = (
        "run_id", "experiment", "seed", "checkpoint", "epoch", "split", "kind", "measure", "metric", "radius", "value",
        "stderr", "low", "high", "count", "norm", "epsilon", "loss", "protocol", "precision", "version", "key",
    )  # fmt: skip
    kinds = {name: "float64" if name in _FLOATS else "Int64" if name in _INTEGERS else "string" for name in names}
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in kinds.items()})
