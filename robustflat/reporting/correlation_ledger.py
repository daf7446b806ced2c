"""The paper's correlations beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd

from robustflat.reporting.bootstrap import Resampling
from robustflat.reporting.columns import columns
from robustflat.reporting.correlation import correlation
from robustflat.reporting.ledger import AGREES, CELLS, NOT_RUN, OTHER, runs_by_row, why_not_comparable
from robustflat.reporting.paper import from_paper
from robustflat.reporting.records import RunRecord

PAIRS: tuple[tuple[str, str], ...] = (
    ("average-case flatness", "RLoss"),
    ("worst-case flatness", "RLoss"),
    ("average-case flatness of CE", "RLoss"),
    ("worst-case flatness of CE", "RLoss"),
    ("average-case flatness", "RErr (AA)"),
    ("average-case flatness", "RErr (PGD)"),
    ("average-case flatness", "RLoss gap"),
    ("average-case flatness", "RLoss after best"),
    ("RLoss", "RErr (AA)"),
)
"""x and y. "RLoss gap" is test minus train, "RLoss after best" last minus early-stopped."""

PUBLISHED: Mapping[tuple[str, str, str], float] = MappingProxyType(
    {
        ("average-case flatness", "RLoss", "pearson"): 0.85,
        ("average-case flatness", "RLoss", "spearman"): 0.87,
        ("worst-case flatness", "RLoss", "pearson"): 0.54,
        ("average-case flatness of CE", "RLoss", "pearson"): 0.27,
    }
)
"""Coefficients in the paper's text. They are not all those of its own printed tables (0.847, 0.856, 0.499, 0.278)."""


def ledger_columns(records: Sequence[RunRecord]) -> pd.DataFrame:
    """A line per run with the quantities of `PAIRS` under their titles (see `columns.columns` for the rest)."""
    titles = dict.fromkeys(title for pair in PAIRS for title in pair)
    asked = {cell.title: cell.quantity for cell in CELLS.values() if cell.title in titles}
    needed = {
        cell.title: cell.quantity for cell in CELLS.values() if cell.title in ("train RLoss", "early-stopped RLoss")
    }
    frame = columns(records, **asked, **needed)
    frame["RLoss gap"] = frame["RLoss"] - frame["train RLoss"]
    frame["RLoss after best"] = frame["RLoss"] - frame["early-stopped RLoss"]
    return frame


def correlation_ledger(
    records: Sequence[RunRecord],
    *,
    methods: Sequence[str] = ("pearson", "spearman"),
    settings: Resampling | None = None,
    comparable: Callable[[RunRecord], str] = why_not_comparable,
) -> pd.DataFrame:
    """Each correlation of the paper beside ours.

    Ours is over the runs of the paper's experiments that can be compared; seeds of one experiment are a cluster. If
    there are none, it is over all runs, and the verdict says so.

    Args:
        records: of our runs; failed ones are left out.
        methods: "pearson", "spearman", "kendall".
        settings: of our intervals.
        comparable: why a run cannot be compared, "" if it can.

    Returns:
        columns x, y, method, models (ours), ours, low, high, p, paper_same (the paper's tables, over the experiments
        that we ran), paper_all (over its 74 models), published (in its text), verdict, sentence. "agrees": paper_same
        lies in our interval.

    Raises:
        UserError: for an unknown method.
    """
    matched = [record for runs in runs_by_row(records).values() for record in runs if not comparable(record)]
    used = matched or [record for record in records if record.status != "failed"]
    ours, theirs = ledger_columns(used), ledger_columns(from_paper())
    ran = {record.experiment.rsplit("-", 1)[-1] for record in matched}
    same = theirs[theirs["experiment"].str.rsplit("-", n=1).str[-1].isin(ran)]
    groups = ours["experiment"] + " " + ours["label"]
    lines = []
    for x, y in PAIRS:
        for method in methods:
            found = correlation(ours[x], ours[y], method=method, names=(x, y), settings=settings,
                                clusters=groups if groups.duplicated().any() else None)  # fmt: skip
            values = [_value(frame, x, y, method) for frame in (same, theirs)]
            line: dict[str, Any] = {"x": x, "y": y, "method": method, "models": found.n, "ours": found.value}
            line |= {
                "low": found.low,
                "high": found.high,
                "p": found.p,
                "paper_same": values[0],
                "paper_all": values[1],
            }
            line["published"] = PUBLISHED.get((x, y, method), math.nan)
            verdict = _verdict(found.low, found.high, values[0], found.why, other=not matched, runs=len(used))
            lines.append(line | {"verdict": verdict, "sentence": found.sentence()})
    return pd.DataFrame(lines)


def _value(frame: pd.DataFrame, x: str, y: str, method: str) -> float:
    # The interval is not used here: the fewest resamples will do.
    return correlation(frame[x], frame[y], method=method, settings=Resampling(interval="analytic")).value


def _verdict(low: float, high: float, paper: float, why: str, *, other: bool, runs: int) -> str:
    if not runs:
        return NOT_RUN
    if other:
        return OTHER
    if why:
        return f"not defined: {why}"
    if math.isnan(low) or math.isnan(paper):
        return "no interval"
    if low <= paper <= high:
        return AGREES
    return f"differs: the paper's {paper:.2f} is {'below' if paper < low else 'above'} our interval"
