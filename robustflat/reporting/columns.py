"""From the tidy tables of many runs to a line per run with the few numbers that a plot or a statistic needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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


Row = tuple[Any, ...]
_READ = ("measure", "metric", "split", "checkpoint", "value", *PARTS)


class Quantity(NamedTuple):
    """What a name such as "pgd20 robust_loss (train) @early_stopped" asks for."""

    measure: str | None
    metric: str
    split: str
    checkpoint: str

    def fits(self, row: Row, early_stopped: str) -> bool:
        """Whether a row (the columns `_READ`) answers; `early_stopped` is the name of that checkpoint in the run."""
        measure, metric, split, checkpoint = row[:4]
        wanted = early_stopped if self.checkpoint == "early_stopped" else self.checkpoint
        if (
            metric != self.metric
            or checkpoint != wanted
            or self.measure not in (None, measure)
            or not isinstance(split, str)
        ):
            return False
        if self.split in ("test", "train"):
            # A role: "test", "test[:1000]", but neither the difference nor another data set's "cifar100 test".
            return re.fullmatch(rf"{self.split}(\[.*\])?", split) is not None
        return bool(split == (GAP if self.split == "gap" else self.split))


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
    >>> [str(value) for value in frame.loc[0, ["label", "x", "y"]]]
    ['+Unlabeled', '0.32', '1.18']

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
    rows = [_rows(record) for record in listed]
    for name, wanted in asked.items():
        found = [_numbers(record, lines, wanted) for record, lines in zip(listed, rows, strict=True)]
        for index, part in enumerate(("", *(f"_{part}" for part in PARTS))):
            made[name + part] = pd.Series([numbers[index] for numbers in found], dtype="float64")
    return pd.DataFrame(made)


def _rows(record: RunRecord) -> list[Row]:
    """The record's table as plain rows: many small look-ups in a frame would take seconds."""
    if record.table.empty:
        return []
    return list(zip(*(record.table[name].tolist() for name in _READ), strict=True))


def _numbers(record: RunRecord, rows: Sequence[Row], wanted: Quantity) -> Sequence[float]:
    found = [row for row in rows if wanted.fits(row, record.early_stopped)]
    if not found:
        return [np.nan] * (1 + len(PARTS))
    measures = list(dict.fromkeys(row[0] for row in found))
    if len(measures) > 1:
        raise UserError(
            f"{record.label} has {wanted.metric} by {', '.join(measures)}; write which, such as "
            f"'{measures[0]} {wanted.metric}'."
        )
    # Measured twice with different settings: the one written last counts, as in store.tables.wide.
    return [float(value) if pd.notna(value) else np.nan for value in found[-1][4:]]
