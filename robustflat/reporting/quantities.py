"""Which numbers of a study play which part, and the frames that figures and tables are drawn from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from robustflat.errors import UserError
from robustflat.reporting.records import RunRecord, Study

GROUPS = ("good", "average", "poor", "worse")
"""Groups of networks by robust error, as in Table 1 of Stutz et al. (ICCV 2021)."""

PERCENTILES = (0.3, 0.7)
"""Where groups end if a study does not say it (Stutz et al.: about these percentiles)."""

_CLASS = re.compile(r"error_class_(\d+)$")


@dataclass(frozen=True)
class Quantity:
    """A number that every network of a study may have.

    Attributes:
        key: column of `run_frame`.
        name: as on axes and in headings, with its unit.
        kind, measure, metric, split: of the rows that hold it.
        stopped: of the early-stopped snapshot instead of the study's checkpoint.
        scale: factor between table and page: 100 for errors in percent.
    """

    key: str
    name: str
    kind: str
    measure: str
    metric: str
    split: str
    stopped: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class _Part:
    """How to find a quantity: wanted rows, and the part that decides the name of its attack or measure."""

    name: str
    kind: str
    metric: str
    split: str = "test"
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
    """The tidy rows of all runs under each other, with the column "run", the position in `study.runs`."""
    tables = [run.table.assign(run=position) for position, run in enumerate(study.runs) if len(run.table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["run"])


def quantities(study: Study) -> dict[str, Quantity]:
    """Key -> quantity, for all that some run has.

    Attacks and measures are those that `study.measures` names, or else: the attack of RErr is AutoAttack where it
    was run; flatness measures are told by their name and loss; of several, the one that most runs have.

    Raises:
        UserError: if `study.measures` names a part that there is none of, or a measure that no run has.
    """
    rows = all_rows(study)
    if rows.empty:
        return {}
    unknown = set(study.measures) - {part.role for part in _PARTS.values() if part.role}
    if unknown:
        allowed = ", ".join(sorted({part.role for part in _PARTS.values() if part.role}))
        raise UserError(f"Study.measures has no part {', '.join(sorted(unknown))}. Allowed: {allowed}.")
    found = {}
    for key, part in _PARTS.items():
        quantity = _found(study, rows, key, part)
        if quantity is not None:
            found[key] = quantity
    return found


def _found(study: Study, rows: pd.DataFrame, key: str, part: _Part) -> Quantity | None:
    kept = rows[(rows["kind"] == part.kind) & (rows["metric"] == part.metric)]
    measure = _measure(study, kept, part.role) if part.role else "clean"
    kept = kept[kept["measure"] == measure]
    splits = kept["split"].astype("string").fillna("")
    kept = kept[splits.str.startswith(part.split) & ~splits.str.contains(" - ", regex=False)]
    if part.stopped:
        kept = kept[
            [study.runs[run].early_stopped == c for run, c in zip(kept["run"], kept["checkpoint"], strict=True)]
        ]
    else:
        kept = kept[kept["checkpoint"] == study.checkpoint]
    if kept.empty:
        return None
    scale = 100.0 if part.metric.endswith("error") else 1.0
    return Quantity(key, part.name, part.kind, measure, part.metric, _commonest(kept["split"]), part.stopped, scale)


def _measure(study: Study, rows: pd.DataFrame, role: str) -> str:
    named = study.measures.get(role)
    if named is not None:
        if not (rows["measure"] == named).any():
            raise UserError(f"Study.measures: no run has '{named}' for {role}. There are: "
                            f"{', '.join(sorted(set(rows['measure'].dropna()))) or 'none'}.")  # fmt: skip
        return named
    if role in _FLATNESS_WORDS:
        word, loss = _FLATNESS_WORDS[role]
        rows = rows[(rows["loss"] == loss) & rows["measure"].str.contains(word)]
        exact = rows[rows["measure"].isin([role, word])]
        return _commonest((exact if len(exact) else rows)["measure"])
    if role == "robust_error":
        strongest = rows[rows["measure"].str.lower().str.contains("autoattack")]
        rows = strongest if len(strongest) else rows
    return _commonest(rows["measure"])


def _commonest(names: pd.Series[str]) -> str:
    counts = names.dropna().value_counts(sort=False)
    return str(counts.idxmax()) if len(counts) else ""


def pick(study: Study, quantity: Quantity) -> pd.DataFrame:
    """The rows that hold a quantity, at most one for each run, indexed by the run's position; the last counts."""
    rows = all_rows(study)
    same = [rows[name] == getattr(quantity, name) for name in ("kind", "measure", "metric", "split")]
    kept = rows[pd.concat(same, axis=1).fillna(False).all(axis=1)]
    wanted = [_checkpoint(study, study.runs[run], quantity) for run in kept["run"]]
    kept = kept[[str(have) == want for have, want in zip(kept["checkpoint"], wanted, strict=True)]]
    return kept.drop_duplicates("run", keep="last").set_index("run")


def _checkpoint(study: Study, run: RunRecord, quantity: Quantity) -> str:
    return run.early_stopped if quantity.stopped else study.checkpoint


def run_frame(study: Study) -> pd.DataFrame:
    """One line for each run: run_id, experiment, label, family, seed, status, and for every quantity key, key_se.

    Errors are in percent, losses and flatness in nats; gap_robust_loss and gap_robust_error are test minus train.
    Missing numbers are NaN.
    """
    runs = study.runs
    frame = pd.DataFrame(
        {name: [getattr(run, name) for run in runs] for name in ("run_id", "experiment", "label", "family", "status")},
        dtype="object",
    )
    frame["seed"] = pd.array([run.seed for run in runs], dtype="Int64")
    for quantity in quantities(study).values():
        rows = pick(study, quantity)
        for column, source in ((quantity.key, "value"), (f"{quantity.key}_se", "stderr")):
            values = rows[source].astype("float64").replace([math.inf, -math.inf], math.nan)
            frame[column] = (values * quantity.scale).reindex(frame.index)
    for metric in ("robust_loss", "robust_error"):
        if {metric, f"train_{metric}"} <= set(frame):
            frame[f"gap_{metric}"] = frame[metric] - frame[f"train_{metric}"]
            frame[f"gap_{metric}_se"] = (frame[f"{metric}_se"] ** 2 + frame[f"train_{metric}_se"] ** 2) ** 0.5
    return frame


def model_frame(study: Study) -> pd.DataFrame:
    """One line for each label: mean over its seeds, standard error over seeds, or that of the evaluation with one seed.

    Columns as in `run_frame` without run_id, experiment, seed and status, and seeds (their number), group.
    """
    frame = run_frame(study)
    frame = frame[frame["status"] != "failed"]
    values = [c for c in frame if frame[c].dtype == "float64" and not c.endswith("_se")]
    lines = []
    for label, part in frame.groupby("label", sort=False):
        line = {"label": label, "family": part["family"].iloc[0], "seeds": len(part)}
        for column in values:
            known = part[column].dropna()
            line[column] = known.mean() if len(known) else math.nan
            alone = part.loc[known.index, f"{column}_se"].iloc[0] if len(known) == 1 else math.nan
            line[f"{column}_se"] = known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else alone
        lines.append(line)
    made = pd.DataFrame(lines, columns=["label", "family", "seeds", *(f"{c}{e}" for c in values for e in ("", "_se"))])
    made["group"] = _groups(study, made)
    return made


def _groups(study: Study, frame: pd.DataFrame) -> list[str]:
    errors = frame["robust_error"] if "robust_error" in frame else pd.Series(math.nan, index=frame.index)
    return [group_of(error, group_edges(study, errors)) for error in errors]


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
