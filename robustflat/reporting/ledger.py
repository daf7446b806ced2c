"""Reproduction ledger: our numbers beside the paper's, with a verdict for each, and the same for correlations.

The frames are made for `robustflat.store.tables.as_text`, which writes them as Markdown, CSV or LaTeX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from robustflat.errors import require_one_of
from robustflat.reporting.columns import columns
from robustflat.reporting.paper import EPSILON, EXAMPLES, printed
from robustflat.reporting.records import RunRecord

DATASET = "cifar10"
"""The only data set of the paper."""


class Cell(NamedTuple):
    """A column of the paper's tables: its title, our quantity (see `columns.quantity`), printed units per unit of ours,
    and half of the last printed digit in our units.
    """

    title: str
    quantity: str
    scale: float
    rounding: float


def _percent(title: str, quantity: str, half: float = 0.0005) -> Cell:
    return Cell(title, quantity, 100.0, half)


def _plain(title: str, quantity: str) -> Cell:
    return Cell(title, quantity, 1.0, 0.005)


CELLS: Mapping[str, Cell] = MappingProxyType(
    {
        "err_test": _percent("Err", "clean error", 0.00005),
        "rerr_test_pgd": _percent("RErr (PGD)", "pgd20 robust_error"),
        "rerr_test_aa": _percent("RErr (AA)", "autoattack robust_error"),
        "err_train": _percent("train Err", "clean error (train)", 0.00005),
        "rerr_train_pgd": _percent("train RErr (PGD)", "pgd20 robust_error (train)"),
        "rerr_train_aa": _percent("train RErr (AA)", "autoattack robust_error (train)"),
        "rerr_stop_pgd": _percent("early-stopped RErr (PGD)", "pgd20 robust_error @early_stopped"),
        "rerr_stop_aa": _percent("early-stopped RErr (AA)", "autoattack robust_error @early_stopped"),
        "avg_ce": _plain("average-case flatness of CE", "average_clean flatness"),
        "worst_ce": _plain("worst-case flatness of CE", "worst_clean flatness"),
        "avg_rloss": _plain("average-case flatness", "average flatness"),
        "worst_rloss": _plain("worst-case flatness", "worst flatness"),
        "ce_test": _plain("CE", "clean loss"),
        "rloss_test_pgd": _plain("RLoss", "pgd20 robust_loss"),
        "ce_train": _plain("train CE", "clean loss (train)"),
        "rloss_train_pgd": _plain("train RLoss", "pgd20 robust_loss (train)"),
        "rloss_stop_pgd": _plain("early-stopped RLoss", "pgd20 robust_loss @early_stopped"),
    }
)
"""Printed columns that we measure. (The loss on AutoAttack's images is not one: it says nothing.)"""

AGREES, NOT_RUN, NOT_MEASURED, OTHER = "agrees", "not run", "not measured", "other data: not comparable"


def why_not_comparable(record: RunRecord) -> str:
    """Why a run's numbers are not those of the paper's setting, "" if nothing says so.

    Looked at: the data set in the provenance (`data`, as `Dataset.describe` writes it), the name of the experiment
    ("iccv21-..."), the network (rows of weight averaging are of the averaged weights), the radius of the threat model
    and the number of examples (the paper: CIFAR-10, 8/255, 1000). What the record does not say, such as another width
    of the network, is not seen.
    """
    if record.dataset and record.dataset != DATASET:
        return f"trained on {record.dataset}"
    if not record.experiment.startswith("iccv21-"):
        return f"experiment {record.experiment}"
    if record.experiment.startswith("iccv21-weight_averaging") and record.part != "average":
        return "not the averaged weights"
    attacked = record.table[record.table["kind"] == "attack"] if len(record.table) else record.table
    if attacked.empty:
        return ""
    radii, counts = attacked["epsilon"].dropna(), attacked["count"].dropna()
    if len(radii) and not np.isclose(radii, EPSILON, rtol=1e-3).any():
        return f"attacked at epsilon {radii.iloc[0]:.4g}"
    return f"evaluated on {counts.max()} examples" if len(counts) and int(counts.max()) < EXAMPLES else ""


def runs_by_row(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Row of the paper (its file in conf/experiment/iccv21) -> our runs of that experiment, failed ones left out.

    A run belongs to the row by which its experiment is called, alone or after a hyphen: at, iccv21-at, digits-at.
    """
    found: dict[str, list[RunRecord]] = {name: [] for name in printed()["experiment"]}
    for record in records:
        row = record.experiment.rsplit("-", 1)[-1]
        if row in found and record.status != "failed":
            found[row].append(record)
    return found


def reproduction_ledger(
    records: Sequence[RunRecord],
    *,
    table: str = "models",
    confidence: float = 0.95,
    comparable: Callable[[RunRecord], str] = why_not_comparable,
) -> pd.DataFrame:
    """Each number of a table of the paper beside ours.

    Ours is the mean over seeds. With several, its interval joins (in squares) the one over seeds by Student's t and the
    one over examples or draws, which all seeds share. With one, it is the run's own and knows nothing of how much
    another training would differ. The paper's number comes from one training: for the verdict, the interval is widened
    by the spread of one training where seeds show it, and by half of the last printed digit.

    Args:
        records: of our runs; failed ones count as not run.
        table: "models" (all 74) or "table1".
        confidence: of the intervals.
        comparable: why a run cannot be compared, "" if it can.

    Returns:
        columns model, experiment, quantity, ours, low, high, interval, paper, difference (ours minus the paper's),
        seeds, verdict: "agrees", "differs by ...", "not run", "not measured", or "other data: not comparable (why)".
        Errors are fractions. A line per model and quantity, in the paper's order.

    Raises:
        UserError: for another table.
    """
    require_one_of("table", table, ("models", "table1"))
    rows, ours = printed(table), runs_by_row(records)
    cells = {name: CELLS[name] for name in rows.columns if name in CELLS}
    whys, used = {}, {}
    for experiment in rows["experiment"]:
        reasons = [comparable(record) for record in ours[experiment]]
        fit = [record for record, reason in zip(ours[experiment], reasons, strict=True) if not reason]
        whys[experiment] = "" if fit or not reasons else reasons[0]
        used[experiment] = fit or ours[experiment]
    # All at once: a frame for each row would take seconds.
    flat = [record for runs in used.values() for record in runs]
    whole = columns(flat, **{name: cell.quantity for name, cell in cells.items()})
    row_of = pd.Series([experiment for experiment, runs in used.items() for _ in runs], dtype="str")
    lines = []
    for row in rows.to_dict("records"):
        experiment = str(row["experiment"])
        frame, runs, why = whole[row_of == experiment], used[experiment], whys[experiment]
        for name, cell in cells.items():
            number = _ours(frame, name, confidence)
            paper = float(row[name]) / cell.scale
            lines.append(_line(row, cell, number, paper, _verdict(number, paper, cell, len(runs), why)))
    return pd.DataFrame(lines).astype({"seeds": "Int64"})


class Ours(NamedTuple):
    """Our number: mean of `seeds` runs, its interval, the one that a single training falls into, and
    how the interval was made. NaN where not known.
    """

    value: float
    low: float
    high: float
    single: tuple[float, float]
    seeds: int
    interval: str


def _ours(frame: pd.DataFrame, name: str, confidence: float) -> Ours:
    known = frame[frame[name].notna()]
    values, count = known[name].to_numpy(dtype=np.float64), len(known)
    if not count:
        return Ours(math.nan, math.nan, math.nan, (math.nan, math.nan), 0, "")
    value, tail = float(values.mean()), 0.5 + confidence / 2
    spread = np.nanmean(known[f"{name}_stderr"]) if known[f"{name}_stderr"].notna().any() else math.nan
    measured = float(special.ndtri(tail)) * float(spread)
    percent = f"{100 * confidence:g} %"
    if count == 1:
        low, high = (float(known[f"{name}_{end}"].iloc[0]) for end in ("low", "high"))
        if math.isnan(low) or confidence != 0.95:
            low, high = value - measured, value + measured
        text = "" if math.isnan(low) else f"{percent} over examples or draws, one training"
        return Ours(value, low, high, (low, high), 1, text)
    reach = float(special.stdtrit(count - 1, tail)) * float(values.std(ddof=1))
    shared = 0.0 if math.isnan(measured) else measured
    half, wide = math.hypot(reach / math.sqrt(count), shared), math.hypot(reach, reach / math.sqrt(count), shared)
    text = f"{percent} over {count} trainings" + ("" if math.isnan(measured) else " and examples or draws")
    return Ours(value, value - half, value + half, (value - wide, value + wide), count, text)


def _verdict(ours: Ours, paper: float, cell: Cell, runs: int, why: str) -> str:
    if not runs:
        return NOT_RUN
    if why:
        return f"{OTHER} ({why})"
    if not ours.seeds:
        return NOT_MEASURED
    low, high = ours.single if not math.isnan(ours.single[0]) else (ours.value, ours.value)
    if low - cell.rounding <= paper + 1e-12 and paper - 1e-12 <= high + cell.rounding:
        return AGREES
    difference = ours.value - paper
    told = f"{100 * difference:+.1f} points" if cell.scale == 100 else f"{difference:+.2f}"
    return f"differs by {told}" + ("" if ours.interval else " (no interval known)")


def _line(row: Mapping[Any, Any], cell: Cell, ours: Ours, paper: float, verdict: str) -> dict[str, Any]:
    return {
        "model": row["model"],
        "experiment": row["experiment"],
        "quantity": cell.title,
        "ours": ours.value,
        "low": ours.low,
        "high": ours.high,
        "interval": ours.interval,
        "paper": round(paper, 6),
        "difference": ours.value - paper,
        "seeds": ours.seeds,
        "verdict": verdict,
    }


def verdicts(ledger: pd.DataFrame) -> str:
    """The ledger in one sentence: how many numbers agree, differ, are missing or cannot be compared."""
    if ledger.empty:
        return "The ledger is empty."
    words = ledger["verdict"].str.replace(r" by .*| \(.*", "", regex=True)
    told = {"differs": "differ", AGREES: "agree", NOT_RUN: "were not run", NOT_MEASURED: "were not measured"} | {
        OTHER: "come from other data"
    }
    counts = [f"{int((words == word).sum())} {text}" for word, text in told.items() if (words == word).any()]
    return f"Of {len(ledger)} numbers of the paper, {', '.join(counts)}."
