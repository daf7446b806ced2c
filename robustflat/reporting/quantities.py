"""Which numbers of a study play which part, and the frames that figures and tables are drawn from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from robustflat.errors import UserError
from robustflat.reporting import columns as named_columns
from robustflat.reporting.records import RunRecord, Study

GROUPS = ("good", "average", "poor", "worse")
"""Groups of networks by robust error, as in Table 1 of Stutz et al. (ICCV 2021)."""

PERCENTILES = (0.3, 0.7)
"""Where groups end if a study does not say it (Stutz et al.: about these percentiles)."""

TEST, TRAIN = "test", "train"

_CLASS = re.compile(r"error_class_(\d+)$")


@dataclass(frozen=True)
class Quantity:
    """A number that every network of a study may have.

    Attributes:
        key: column of `run_frame`.
        title: as on axes and in headings, with its unit.
        name: as `columns.quantity` reads it.
        scale: factor between table and page: 100 for errors in percent.
    """

    key: str
    title: str
    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class _Part:
    """How to find a quantity: wanted rows, and the part that decides the name of its attack or measure."""

    title: str
    kind: str
    metric: str
    split: str = TEST
    role: str = ""
    stopped: bool = False


_PARTS = {
    "error": _Part("Err (%)", "clean", "error"),
    "train_error": _Part("train Err (%)", "clean", "error", "train"),
    "loss": _Part("CE (nats)", "clean", "loss"),
    "robust_error": _Part("RErr (%)", "attack", "robust_error", role="robust_error"),
    "train_robust_error": _Part("train RErr (%)", "attack", "robust_error", "train", "robust_error"),
    "robust_loss": _Part("RLoss (nats)", "attack", "robust_loss", role="robust_loss"),
    "train_robust_loss": _Part("train RLoss (nats)", "attack", "robust_loss", "train", "robust_loss"),
    "stopped_robust_error": _Part("stopped RErr (%)", "attack", "robust_error", role="robust_error", stopped=True),
    "stopped_robust_loss": _Part("stopped RLoss (nats)", "attack", "robust_loss", role="robust_loss", stopped=True),
    "average": _Part("average-case flatness (nats)", "flatness", "flatness", role="average"),
    "worst": _Part("worst-case flatness (nats)", "flatness", "flatness", role="worst"),
    "average_clean": _Part("average-case flatness of CE (nats)", "flatness", "flatness", role="average_clean"),
    "worst_clean": _Part("worst-case flatness of CE (nats)", "flatness", "flatness", role="worst_clean"),
    "stopped_average": _Part("stopped average-case flatness", "flatness", "flatness", role="average", stopped=True),
}  # fmt: skip

_FLATNESS_WORDS = {
    "average": ("average", "robust"),
    "worst": ("worst", "robust"),
    "average_clean": ("average", "clean"),
    "worst_clean": ("worst", "clean"),
}


def all_rows(study: Study) -> pd.DataFrame:
    """The tidy rows of all runs under each other, with the label of their run; empty if there are none."""
    tables = [run.table.assign(label=run.label) for run in study.runs if len(run.table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


class Pool:
    """The rows of a study's runs, read together: a quantity of 200 runs is one selection."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.rows = all_rows(study)
        by_name: dict[str, list[int]] = {}
        for position, run in enumerate(study.runs):
            if len(run.table):
                by_name.setdefault(run.early_stopped, []).append(position)
        # Runs differ in what they call the early-stopped network, so those that agree are read as one record.
        self._records = [replace(study.runs[some[0]], table=self._joined(some)) for some in by_name.values()]
        self._known: dict[str, pd.DataFrame] = {}

    def _joined(self, positions: Sequence[int]) -> pd.DataFrame:
        return pd.concat([self.study.runs[i].table.assign(run=i) for i in positions], ignore_index=True)

    def find(self, quantity: Quantity) -> pd.DataFrame:
        """The row of each run that holds a quantity, the last if there are several, indexed by the run's position."""
        if quantity.name not in self._known:
            wanted = named_columns.quantity(quantity.name)
            found = [rows for record in self._records if len(rows := _answering(record, wanted))]
            joined = pd.concat(found) if found else pd.DataFrame(columns=["run", *_NUMBERS])
            self._known[quantity.name] = joined.drop_duplicates("run", keep="last").set_index("run").sort_index()
        return self._known[quantity.name]


_NUMBERS = ("value", "stderr")


def _answering(record: RunRecord, wanted: named_columns.Quantity) -> pd.DataFrame:
    """The rows of a record's table that hold a quantity."""
    rows = record.table[(record.table["metric"] == wanted.metric).fillna(False)]
    parts = rows[["measure", "metric", "split", "checkpoint"]].astype("object")
    parts = parts.where(parts.notna(), None)
    return rows[[wanted.fits(tuple(part), record.early_stopped) for part in parts.itertuples(index=False)]]


def quantities(pool: Pool) -> dict[str, Quantity]:
    """Key -> quantity, for all that some run has.

    Attacks and measures are those that `study.measures` names, or else those that most runs have on test examples at
    the study's checkpoint, of equals the first in the tables. The attack of RErr is AutoAttack if some run has it
    there; flatness measures are told by their name and loss.

    Raises:
        UserError: if `study.measures` names a part that there is none of, or a measure that no run has, or no run has
            the study's checkpoint.
    """
    study = pool.study
    if pool.rows.empty:
        return {}
    unknown = set(study.measures) - {part.role for part in _PARTS.values() if part.role}
    if unknown:
        allowed = ", ".join(sorted({part.role for part in _PARTS.values() if part.role}))
        raise UserError(f"Study.measures has no part {', '.join(sorted(unknown))}. Allowed: {allowed}.")
    checkpoints = sorted(set(pool.rows["checkpoint"].dropna()))
    if study.checkpoint not in ("last", "early_stopped", *checkpoints):
        raise UserError(f"Study.checkpoint: no run has '{study.checkpoint}'. There are: {', '.join(checkpoints)}.")
    found = {key: _found(pool, key, part) for key, part in _PARTS.items()}
    return {key: quantity for key, quantity in found.items() if quantity is not None}


def _found(pool: Pool, key: str, part: _Part) -> Quantity | None:
    measure = _measure(pool, part) if part.role else "clean"
    if not measure:
        return None
    checkpoint = "early_stopped" if part.stopped else pool.study.checkpoint
    name = f"{measure} {part.metric} ({part.split}) @{checkpoint}"
    quantity = Quantity(key, part.title, name, 100.0 if part.metric.endswith("error") else 1.0)
    return quantity if len(pool.find(quantity)) else None


def _measure(pool: Pool, part: _Part) -> str:
    """Name of the attack or measure of a part, "" if there is none."""
    rows, role, study = pool.rows, part.role, pool.study
    rows = rows[(rows["kind"] == part.kind) & (rows["metric"] == part.metric)]
    named = study.measures.get(role)
    if named is not None:
        if not (rows["measure"] == named).any():
            raise UserError(f"Study.measures: no run has '{named}' for {role}. There are: "
                            f"{', '.join(sorted(set(rows['measure'].dropna()))) or 'none'}.")  # fmt: skip
        return named
    word, loss = _FLATNESS_WORDS.get(role, ("", ""))
    if word:
        rows = rows[(rows["loss"] == loss) & rows["measure"].str.contains(word)]
    # Runs are counted, not rows: snapshots may have been measured in passing, each with rows of its own.
    runs = {
        str(name): len(pool.find(Quantity("", "", f"{name} {part.metric} ({TEST}) @{study.checkpoint}")))
        for name in dict.fromkeys(rows["measure"].dropna())
    }
    first = [name for name in runs if runs[name] and (name in (role, word) or _is_strongest(name, role))]
    return max(first or runs, key=runs.__getitem__, default="")


def _is_strongest(attack: str, role: str) -> bool:
    return role == "robust_error" and "autoattack" in attack.lower()


def measures_of(pool: Pool) -> list[Quantity]:
    """All flatness measures that some run has, on test and on training examples, in the order of the tables."""
    rows, study = pool.rows, pool.study
    if rows.empty:
        return []
    kept = rows[(rows["metric"] == "flatness") & (rows["checkpoint"] == study.checkpoint)]
    found = []
    for split in (TEST, TRAIN):
        for measure in dict.fromkeys(kept["measure"].dropna()):
            name = f"{measure} flatness ({split}) @{study.checkpoint}"
            quantity = Quantity(f"{measure} {split}", f"{measure}, {split}", name)
            if len(pool.find(quantity)):
                found.append(quantity)
    return found


def run_frame(pool: Pool, wanted: Sequence[Quantity]) -> pd.DataFrame:
    """One line for each run: run_id, experiment, label, family, seed, status, group, and key, key_stderr of quantities.

    Errors are in percent, losses and flatness in nats; gap_robust_loss and gap_robust_error are test minus train.
    Numbers that are missing or not finite are NaN.
    """
    runs = pool.study.runs
    made = {name: pd.Series([getattr(run, name) for run in runs], dtype="Int64" if name == "seed" else "str")
            for name in (*named_columns.IDENTITY, "status")}  # fmt: skip
    for quantity in wanted:
        rows = pool.find(quantity)
        for ending, column in zip(("", "_stderr"), _NUMBERS, strict=True):
            values = rows[column].astype("float64").replace([math.inf, -math.inf], math.nan)
            made[quantity.key + ending] = values.reindex(range(len(runs))) * quantity.scale
    for metric in ("robust_loss", "robust_error"):
        if {metric, f"train_{metric}"} <= set(made):
            made[f"gap_{metric}"] = made[metric] - made[f"train_{metric}"]
            squares = made[f"{metric}_stderr"] ** 2 + made[f"train_{metric}_stderr"] ** 2
            made[f"gap_{metric}_stderr"] = squares**0.5
    frame = pd.DataFrame(made)
    errors = made.get("robust_error", pd.Series(math.nan, index=frame.index, dtype="float64"))
    edges = group_edges(pool.study, errors[frame["status"] != "failed"])
    return frame.assign(group=[group_of(float(error), edges) for error in errors])


def model_frame(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each label: mean over its seeds, standard error over seeds, or that of the evaluation with one seed.

    Args:
        study: whose groups count.
        frame: from `run_frame`.

    Returns:
        label, family, seeds (their number), group, the numbers of `frame`, and <number>_seeds, how many seeds have it.
    """
    values = [str(name) for name in frame if f"{name}_stderr" in frame]
    lines = [_mean_of(part, values) for _, part in frame.groupby("label", sort=False)]
    names = [name + ending for name in values for ending in ("", "_stderr", "_seeds")]
    made = pd.DataFrame(lines, columns=["label", "family", "seeds", *names])
    errors = made["robust_error"] if "robust_error" in made else pd.Series(math.nan, index=made.index)
    edges = group_edges(study, frame.get("robust_error", errors))
    return made.assign(group=[group_of(float(error), edges) for error in errors])


def _mean_of(part: pd.DataFrame, values: Sequence[str]) -> dict[str, object]:
    line: dict[str, object] = {"label": part["label"].iloc[0], "family": part["family"].iloc[0], "seeds": len(part)}
    for name in values:
        known = part[name].dropna()
        line[name] = float(known.mean()) if len(known) else math.nan
        line[f"{name}_seeds"] = len(known)
        if len(known) > 1:
            line[f"{name}_stderr"] = float(known.std(ddof=1)) / math.sqrt(len(known))
        else:
            line[f"{name}_stderr"] = float(part.loc[known.index[0], f"{name}_stderr"]) if len(known) else math.nan
    return line


def group_edges(study: Study, errors: pd.Series[float]) -> tuple[float, ...]:
    """Robust errors in percent at which groups end: the study's, or percentiles of the networks."""
    if study.group_edges:
        return tuple(100 * edge for edge in study.group_edges)
    known = errors.dropna()
    return tuple(float(known.quantile(share)) for share in PERCENTILES) if len(known) > 2 else ()


def group_of(error: float, edges: Sequence[float]) -> str:
    """The group of a robust error; "" if it is unknown or there are no groups."""
    if not edges or math.isnan(error):
        return ""
    # As in the paper, an error at an edge belongs to the worse side, but at the last of three edges to the better.
    above = sum(error > edge if position == 2 else error >= edge for position, edge in enumerate(edges))
    return GROUPS[min(above, len(GROUPS) - 1)]


def class_count(study: Study) -> int | None:
    """K: the study's own word, or one more than the highest class that the tables have an error of."""
    if study.classes is not None:
        return study.classes
    metrics = {str(metric) for run in study.runs if len(run.table) for metric in run.table["metric"].dropna().unique()}
    numbers = [int(found[1]) for metric in metrics if (found := _CLASS.search(metric))]
    return max(numbers) + 1 if numbers else None
