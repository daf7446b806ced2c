"""From the tidy tables of many runs to a line per run with the few numbers that a plot or a statistic needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from robustflat.errors import UserError
from robustflat.reporting.records import RunRecord

IDENTITY = ("run_id", "experiment", "label", "family", "seed")
"""Columns that each line begins with."""

PARTS = ("stderr", "low", "high")
"""What comes with each number where it is known: <name>_stderr, <name>_low, <name>_high."""

GAP = "test - train"
"""Split of the rows that are differences."""

_NAME = re.compile(
    r"^(?:(?P<measure>[^\s()@]+) )?(?P<metric>[^\s()@]+)(?: \((?P<split>[^)]+)\))?(?: @(?P<checkpoint>\S+))?$"
)


class Quantity(NamedTuple):
    """What a name such as "pgd20 robust_loss (train) @early_stopped" asks for."""

    measure: str | None
    metric: str
    split: str
    checkpoint: str

    def rows(self, record: RunRecord) -> pd.DataFrame:
        """The rows of the record's table that answer."""
        table = record.table
        if table.empty:
            return table
        checkpoint = record.early_stopped if self.checkpoint == "early_stopped" else self.checkpoint
        found = table[(table["metric"] == self.metric) & (table["checkpoint"] == checkpoint)]
        if self.measure is not None:
            found = found[found["measure"] == self.measure]
        if self.split in ("test", "train"):
            # A role: "test", "test[:1000]", but neither the difference nor another data set's "cifar100 test".
            return found[found["split"].str.fullmatch(rf"{self.split}(\[.*\])?", na=False)]
        return found[found["split"] == (GAP if self.split == "gap" else self.split)]


def quantity(name: str) -> Quantity:
    """Read the name of a quantity: "[measure ]metric[ (split)][ @checkpoint]".

    Without a measure, the one that has the metric. `split` is test (default), train, gap or a split as it is written in
    the table, such as "test[:1000]" or "cifar100 test". `checkpoint` is last (default), early_stopped or a name.
    "flatness (gap)" and "robust_loss (gap)" mean the rows robust_loss_gap, ... of the split "test - train".

    Raises:
        UserError: if it cannot be read.
    """
    match = _NAME.match(name.strip())
    if match is None:
        raise UserError(
            f"'{name}' is no quantity. Write [measure ]metric[ (split)][ @checkpoint], such as 'robust_loss', "
            "'average flatness', 'pgd20 robust_loss (train)' or 'robust_loss @early_stopped'."
        )
    split, metric = match["split"] or "test", match["metric"]
    if metric.endswith("_gap"):
        split = "gap"
    elif split == "gap":
        metric = f"{metric}_gap"
    return Quantity(match["measure"], metric, split, match["checkpoint"] or "last")


def columns(records: Iterable[RunRecord], **names: str) -> pd.DataFrame:
    """A line per run with the numbers asked for.

    >>> from robustflat.reporting.paper import from_paper
    >>> frame = columns(from_paper(), x="average flatness", y="robust_loss")
    >>> frame.loc[0, ["label", "x", "y"]].tolist()
    ['+Unlabeled', 0.32, 1.18]

    Args:
        records: of runs; also failed ones, which have missing numbers.
        names: column -> quantity, as `quantity` reads it.

    Returns:
        columns `IDENTITY`, then for each name the value and <name>_stderr, <name>_low, <name>_high; all missing where
        the run has no such row. Lines in the order of the records.

    Raises:
        UserError: if a name cannot be read, is one of `IDENTITY`, or fits numbers of several measures of one run.
    """
    taken = [name for name in names if name in IDENTITY]
    if taken:
        raise UserError(f"{taken[0]} is a column that each line has already; choose another name.")
    asked = {name: quantity(text) for name, text in names.items()}
    listed = list(records)
    made: dict[str, pd.Series] = {
        part: pd.Series([getattr(record, part) for record in listed], dtype="Int64" if part == "seed" else "str")
        for part in IDENTITY
    }
    for name, wanted in asked.items():
        found = [_numbers(record, wanted) for record in listed]
        for index, part in enumerate(("", *(f"_{part}" for part in PARTS))):
            made[name + part] = pd.Series([numbers[index] for numbers in found], dtype="float64")
    return pd.DataFrame(made)


def _numbers(record: RunRecord, wanted: Quantity) -> Sequence[float]:
    rows = wanted.rows(record)
    if rows.empty:
        return [np.nan] * (1 + len(PARTS))
    measures = list(dict.fromkeys(rows["measure"]))
    if len(measures) > 1:
        raise UserError(
            f"{record.label} has {wanted.metric} by {', '.join(measures)}; write which, such as "
            f"'{measures[0]} {wanted.metric}'."
        )
    # Measured twice with different settings: the one written last counts, as in store.tables.wide.
    last = rows.iloc[-1]
    return [float(last[part]) if pd.notna(last[part]) else np.nan for part in ("value", *PARTS)]
