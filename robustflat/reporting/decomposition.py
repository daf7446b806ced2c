"""What a robust loss is made of, when robust overfitting sets in, and what a comparison costs.

test RLoss (last) = train RLoss + generalisation gap = early-stopped RLoss + what training after the best epoch cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.reporting.columns import columns, quantity
from robustflat.reporting.paired import column
from robustflat.reporting.records import LEDGER_COLUMNS, RunRecord

COSTS = ("passes", "seconds", "images")
"""What compute is counted in: forward plus backward passes, seconds, or images that went through the network."""

TRAINING = ("train", "training")
"""Phases of a compute ledger that are training."""


def decomposed(records: Sequence[RunRecord], metric: str = "robust_loss") -> pd.DataFrame:
    """A line per run: its test value, and its parts.

    Args:
        records: of runs.
        metric: "robust_loss", "pgd20 robust_error", ...; without split and checkpoint, which this function adds.

    Returns:
        the columns of `columns` that name the run, then last (test value of the last checkpoint), train, early_stopped,
        gap (last minus train), after_best (last minus early-stopped), onset (epoch where the final rise begins, see
        `overfitting_onset`, from the history column "test/<metric>"), and note: why a part is missing. `gap_stderr`
        takes the two example sets as independent. `after_best` has no standard error: both networks saw the same
        examples, whose losses are not in the records.

    Raises:
        UserError: if the metric has a split or a checkpoint, or cannot be read.
    """
    asked = quantity(metric)
    if (asked.split, asked.checkpoint) != ("test", "last"):
        raise UserError(f"decomposed takes a metric without split and checkpoint, got '{metric}'.")
    listed = list(records)
    frame = columns(listed, last=metric, train=f"{metric} (train)", early_stopped=f"{metric} @early_stopped")
    frame["gap"] = frame["last"] - frame["train"]
    frame["gap_stderr"] = np.sqrt(frame["last_stderr"] ** 2 + frame["train_stderr"] ** 2)
    frame["after_best"] = frame["last"] - frame["early_stopped"]
    found = [overfitting_onset(record.history, f"test/{asked.metric}") for record in listed]
    frame["onset"] = pd.Series([onset.epoch for onset in found], dtype="Int64")
    missing = [
        "; ".join(text for name, text in _MISSING.items() if pd.isna(line[name])) for line in frame.to_dict("records")
    ]
    frame["note"] = pd.Series(missing, dtype="str")
    return frame


_MISSING = {
    "last": "not evaluated on test",
    "train": "not evaluated on train",
    "early_stopped": "no early-stopped network",
}


@dataclass(frozen=True)
class Onset:
    """Where the final rise of a curve begins.

    Attributes:
        epoch: of the onset; None if there is none, and then `why` says why.
        best_epoch, best: epoch and value of the lowest point of the smoothed curve; None, NaN if there is no curve.
        rise: last smoothed value minus the lowest one.
        why: why there is no onset.
    """

    epoch: int | None = None
    best_epoch: int | None = None
    best: float = math.nan
    rise: float = math.nan
    why: str = ""

    def __str__(self) -> str:
        if self.epoch is None:
            return f"No robust overfitting seen: {self.why}"
        return f"The final rise begins after epoch {self.epoch}: {self.rise:.2f} above the best value {self.best:.2f}."


def overfitting_onset(
    history: pd.DataFrame,
    name: str = "test/robust_loss",
    *,
    window: int = 3,
    least: float = 0.05,
    share: float = 0.1,
) -> Onset:
    """Epoch where the test loss starts its final rise.

    Definition: smooth the values of the evaluated epochs by the running median of `window` of them; let m be the lowest
    smoothed value and e the last one. There is a final rise if e - m > `least` * |m|. Its onset is the last epoch at
    which the smoothed loss is at most m + `share` * (e - m): from there on it never comes back near its best. A share
    above 0 keeps a small chance dip from moving the onset to the front of a long flat stretch.

    Args:
        history: a line per epoch with the column "epoch"; epochs without a value are skipped.
        name: column of the loss (or error).
        window: evaluated epochs in the median, odd, >= 1; shortened at the ends of the curve.
        least: rise that counts, relative to the lowest value.
        share: part of the rise that still counts as near the best, in [0, 1).

    Raises:
        UserError: if a setting is outside its range.
    """
    require_range("window", window, low=1)
    require_range("least", least, low=0.0)
    require_range("share", share, low=0.0, high=1.0, high_open=True)
    if window % 2 == 0:
        raise UserError(f"window must be odd, got {window}.")
    if history.empty or name not in history or "epoch" not in history:
        return Onset(why=f"The history has no values of {name}.")
    values, epochs = column(history[name], name), column(history["epoch"], "epoch")
    known = np.isfinite(values) & np.isfinite(epochs)
    order = np.argsort(epochs[known], kind="stable")
    values, epochs = values[known][order], epochs[known][order]
    if len(values) < 3:
        return Onset(why=f"{len(values)} evaluated epochs are too few; a rise needs at least 3.")
    half = window // 2
    smooth = np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
    lowest, best_epoch = float(smooth.min()), int(epochs[int(smooth.argmin())])
    rise = float(smooth[-1]) - lowest
    if rise <= least * abs(lowest):
        return Onset(None, best_epoch, lowest, rise, f"{name} ends {rise:.3f} above its lowest value {lowest:.3f}.")
    onset = int(epochs[np.flatnonzero(smooth <= lowest + share * rise)[-1]])
    return Onset(onset, best_epoch, lowest, rise)


def training_cost(record: RunRecord, unit: str = "passes", phases: Sequence[str] = TRAINING) -> float:
    """Compute of some phases of a run; NaN if its ledger does not have them.

    Args:
        record: of the run.
        unit: one of `COSTS`. Passes are counted in batches, so compare them at equal batch size only; images
            count once per pass.
        phases: which phases count.

    Raises:
        UserError: for another unit, or a ledger without its columns.
    """
    require_one_of("unit", unit, COSTS)
    if record.ledger.empty:
        return math.nan
    absent = [name for name in LEDGER_COLUMNS[:5] if name not in record.ledger]
    if absent:
        raise UserError(
            f"The ledger of {record.label} has no column {absent[0]}; expected {', '.join(LEDGER_COLUMNS)}."
        )
    rows = record.ledger[record.ledger["phase"].isin(list(phases))]
    if rows.empty:
        return math.nan
    parts = {"passes": ("forwards", "backwards"), "seconds": ("seconds",), "images": ("images",)}[unit]
    return float(sum(column(rows[part], part).sum() for part in parts))


def compared_at_cost(
    records: Sequence[RunRecord],
    metric: str = "robust_loss",
    *,
    reference: str | None = None,
    unit: str = "passes",
    tolerance: float = 0.1,
    phases: Sequence[str] = TRAINING,
) -> pd.DataFrame:
    """Runs against a reference run that cost as much, and which of them nothing cheaper beats.

    Args:
        records: of runs with compute ledgers.
        metric: quantity in which lower is better, as `columns` reads it.
        reference: label of the run to compare with; None: the cheapest one.
        unit: one of `COSTS`.
        tolerance: relative difference in cost up to which two runs count as equally expensive.
        phases: which phases count.

    Returns:
        run_id, experiment, label, family, seed, value, stderr, cost, relative_cost (to the mean of the reference's
        runs), equal_cost (True, False, or missing where a cost is not known), difference (value minus that of the
        reference, only at equal cost), efficient (no run is as cheap and better), note. Sorted by cost.

    Raises:
        UserError: if there is no run of that label, or a setting is outside its range.
    """
    require_range("tolerance", tolerance, low=0.0)
    listed = list(records)
    frame = (
        columns(listed, value=metric)
        .drop(columns=["value_low", "value_high"])
        .rename(columns={"value_stderr": "stderr"})
    )
    frame["cost"] = pd.Series([training_cost(record, unit, phases) for record in listed], dtype="float64")
    if reference is None and frame["cost"].notna().any():
        reference = str(frame.sort_values("cost", kind="stable")["label"].iloc[0])
    of_reference = frame[frame["label"] == reference]
    if reference is not None and of_reference.empty:
        raise UserError(f"No run is labelled '{reference}'. Labels: {', '.join(dict.fromkeys(frame['label']))}.")
    cost, value = (_mean(of_reference[name]) for name in ("cost", "value"))
    frame["relative_cost"] = frame["cost"] / cost
    near = (frame["relative_cost"] - 1).abs() <= tolerance
    frame["equal_cost"] = near.astype("boolean").mask(frame["relative_cost"].isna())
    frame["difference"] = (frame["value"] - value).where(near)
    frame["efficient"] = _efficient(frame["cost"].to_numpy(), frame["value"].to_numpy())
    frame["note"] = frame["cost"].isna().map({True: "no compute ledger", False: ""})
    frame.loc[frame["value"].isna(), "note"] = "not measured"
    return frame.sort_values("cost", kind="stable", na_position="last", ignore_index=True)


def history_at_cost(
    records: Sequence[RunRecord],
    name: str = "test/robust_loss",
    *,
    budget: float | None = None,
    unit: str = "passes",
    phases: Sequence[str] = TRAINING,
) -> pd.DataFrame:
    """Value of each run's curve when it had cost `budget`: methods of different price stopped at the same one.

    Every epoch is taken to cost the same. A schedule that was made for more epochs has not come down by then, so the
    value is what stopping there gives, not what training for this budget would.

    Args:
        records: of runs with ledgers and histories.
        name: column of the histories.
        budget: in `unit`; None: the cost of the cheapest run.
        unit, phases: as in `compared_at_cost`.

    Returns:
        run_id, label, seed, value (of the last evaluated epoch within the budget), epoch, cost (of the whole run),
        note.

    Raises:
        UserError: if the budget is not positive.
    """
    listed = list(records)
    costs = [training_cost(record, unit, phases) for record in listed]
    known = [cost for cost in costs if cost > 0]
    limit = min(known, default=math.nan) if budget is None else budget
    if budget is not None:
        require_range("budget", budget, low=0.0, low_open=True)
    lines = []
    for record, cost in zip(listed, costs, strict=True):
        value, epoch, note = _within(record.history, name, limit / cost if cost > 0 else math.nan)
        lines.append((record.run_id, record.label, record.seed, value, epoch, cost, note))
    frame = pd.DataFrame(lines, columns=["run_id", "label", "seed", "value", "epoch", "cost", "note"])
    return frame.astype({"seed": "Int64", "epoch": "Int64", "value": "float64", "cost": "float64"})


def _within(history: pd.DataFrame, name: str, part: float) -> tuple[float, int | None, str]:
    """Last value within a part of the epochs, its epoch, and why there is none."""
    if math.isnan(part):
        return math.nan, None, "no compute ledger"
    if history.empty or name not in history or "epoch" not in history:
        return math.nan, None, f"no history of {name}"
    last = float(history["epoch"].max())
    rows = history[(history["epoch"] <= last * part * (1 + 1e-9)) & np.isfinite(column(history[name], name))]
    if rows.empty:
        return math.nan, None, "not evaluated within the budget"
    chosen = rows.sort_values("epoch", kind="stable").iloc[-1]
    return float(chosen[name]), int(chosen["epoch"]), ""


def _efficient(costs: np.ndarray, values: np.ndarray) -> list[bool]:
    """Which points have none that is at most as expensive and better, or cheaper and at most as bad."""
    found = []
    for cost, value in zip(costs, values, strict=True):
        better = ((costs <= cost) & (values < value)) | ((costs < cost) & (values <= value))
        found.append(bool(np.isfinite(cost) and np.isfinite(value) and not better.any()))
    return found


def _mean(values: pd.Series) -> float:
    known = values.dropna()
    return float(known.mean()) if len(known) else math.nan
