"""Tables of a report: what the page shows, and the frames that its downloads hold in full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from robustflat.reporting.drawing import Missing
from robustflat.reporting.quantities import pick, quantities, run_frame
from robustflat.reporting.records import LEDGER_COLUMNS, Study

DASH = "–"
"""Stands for a number that there is not."""

_RUN_QUANTITIES = (
    "error", "robust_error", "robust_loss", "train_robust_error", "train_robust_loss", "gap_robust_error",
    "gap_robust_loss", "average", "worst", "average_clean", "worst_clean", "stopped_robust_error",
    "stopped_robust_loss", "stopped_average",
)  # fmt: skip
_GAPS = {"gap_robust_loss": "RLoss gap (nats)", "gap_robust_error": "RErr gap (%)"}

_SAID = ("measure", "split", "checkpoint", "epoch", "count", "norm", "epsilon", "radius", "loss", "protocol")
_SAID_OF_RUN = ("precision", "version", "commit", "key")


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number it sorts by ("" if unknown); None for text."""

    text: str
    order: float | str | None = None


@dataclass(frozen=True)
class ReportTable:
    """A table of the page.

    Attributes:
        key: name of its files: lower-case letters, digits and "_".
        title, caption: texts.
        columns: headings.
        numeric: which columns hold numbers.
        rows: of cells.
        frame: what is downloaded.
        filters: a search field over every column.
        deferred: so long that only the rows in sight are put into the page.
    """

    key: str
    title: str
    caption: str
    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]
    frame: pd.DataFrame
    filters: bool = False
    deferred: bool = False


def table_of(
    frame: pd.DataFrame, key: str, title: str, caption: str = "", *, filters: bool = False, deferred: bool = False
) -> ReportTable:
    """A table that shows a frame as it is: floats with four significant digits, missing values as a dash."""
    numeric = tuple(pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes)
    columns = [[_cell(value, number) for value in frame.iloc[:, i]] for i, number in enumerate(numeric)]
    rows = tuple(zip(*columns, strict=True)) if len(frame) else ()
    return ReportTable(key, title, caption, tuple(map(str, frame.columns)), numeric, rows, frame, filters, deferred)


def _cell(value: object, numeric: bool) -> Cell:
    if value is None or value is pd.NA or value != value:
        return Cell(DASH, "" if numeric else None)
    if numeric and isinstance(value, float):
        return Cell(number(value), value if math.isfinite(value) else "")
    return Cell(str(value), int(str(value)) if numeric else None)


def number(value: float, digits: int = 4) -> str:
    """Four significant digits without an exponent where that is short; a dash for NaN."""
    if math.isnan(value):
        return DASH
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return f"{value:.{digits - 1}e}"


def with_error(value: float, error: float) -> str:
    """The value, rounded to two digits of its standard error where that is known."""
    if math.isnan(value) or math.isnan(error) or error <= 0:
        return number(value)
    places = min(max(0, 1 - math.floor(math.log10(error))), 6)
    return f"{value:.{places}f} ± {error:.{places}f}"


def runs_table(study: Study) -> ReportTable | Missing:
    """All runs with their main numbers; sorts and filters by value, downloads values and standard errors."""
    title = "All runs"
    if not study.runs:
        return Missing("runs", title, "There are no runs.")
    frame = run_frame(study)
    known = quantities(study)
    shown = [key for key in _RUN_QUANTITIES if key in frame and frame[key].notna().any()]
    texts = ["label", "family", "seed", "status", "experiment", "run_id"]
    head = ["model", "family", "seed", "status", "experiment", "run"]
    names = [known[key].name if key in known else _GAPS[key] for key in shown]
    rows = tuple(
        (*(_cell(frame[t].iloc[i], t == "seed") for t in texts),
         *(_with_error_cell(frame[k].iloc[i], frame[f"{k}_stderr"].iloc[i]) for k in shown))
        for i in range(len(frame))
    )  # fmt: skip
    full = frame[[*texts, *(f"{key}{ending}" for key in shown for ending in ("", "_stderr"))]]
    numeric = (*(t == "seed" for t in texts), *(True for _ in shown))
    caption = (
        f"{len(frame)} runs. Press a heading to sort; type into the fields to filter, numbers too. ± is one standard "
        "error over examples (errors, losses) or draws (flatness)."
    )
    return ReportTable("runs", title, caption, (*head, *names), numeric, rows, full, filters=True)


def _with_error_cell(value: float, error: float) -> Cell:
    return Cell(with_error(value, error), "" if math.isnan(value) else float(value))


def provenance_table(study: Study) -> ReportTable | Missing:
    """One line for each number of the page: which run and network, how it was measured, by which code."""
    title = "Provenance of every number"
    lines = [line for quantity in quantities(study).values() for line in _provenance(study, quantity.key)]
    if not lines:
        return Missing("provenance", title, "No run has a number yet.")
    full = pd.DataFrame(lines)
    for name in ("seed", "epoch", "count"):
        full[name] = full[name].astype("Int64")
    same = {
        str(name): full[name].iloc[0]
        for name in full
        if name not in ("run", "model", "number", "value", "stderr") and full[name].nunique(dropna=False) == 1
    }
    known = {name: value for name, value in same.items() if value is not None and value is not pd.NA and value == value}
    caption = f"{len(full)} numbers."
    if known:
        caption += " The same for all: " + ", ".join(f"{name} {_plain(value)}" for name, value in known.items()) + "."
    shown = full.drop(columns=[name for name in same if name in full])
    made = table_of(shown, "provenance", title, caption, filters=True, deferred=True)
    return ReportTable(**{**made.__dict__, "frame": full})


def _provenance(study: Study, key: str) -> list[dict[str, object]]:
    quantity = quantities(study)[key]
    made = []
    for position, row in pick(study, quantity).iterrows():
        run = study.runs[int(str(position))]
        said = {name: row[name] for name in (*_SAID, *_SAID_OF_RUN) if name in row}
        made.append({
            "run": run.run_id, "model": run.label, "seed": run.seed, "number": quantity.name,
            "value": float(row["value"]) * quantity.scale, "stderr": float(row["stderr"]) * quantity.scale,
            **said, "commit": _commit(run.provenance),
        })  # fmt: skip
    return made


def _commit(provenance: Mapping[str, object]) -> str:
    found = provenance.get("commit") or provenance.get("source") or ""
    return str(found)[:12] if provenance.get("commit") else str(found)


def _plain(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def problems_table(study: Study) -> ReportTable | Missing:
    """Failed and partial runs with the reason."""
    title = "Failed and partial runs"
    bad = [run for run in study.runs if run.status != "done" or run.problem]
    if not bad:
        return Missing("problems", title, "None: all runs are done." if study.runs else "There are no runs.")
    columns = ("model", "seed", "status", "reason", "experiment", "run")
    rows = [(r.label, r.seed, r.status, r.problem or "no reason known", r.experiment, r.run_id) for r in bad]
    frame = pd.DataFrame(rows, columns=list(columns)).astype({"seed": "Int64"})
    return table_of(frame, "problems", title, f"{len(bad)} of {len(study.runs)} runs.")


def curvature_table(study: Study) -> ReportTable | Missing:
    """Ends of the Hessian's spectrum for every run that has them (Table of the supplement of Stutz et al.)."""
    title = "Curvature at the weights"
    lines = [
        {
            "model": run.label, "seed": run.seed, "largest eigenvalue": _float(run.curvature, "value"),
            "|smallest| / |largest|": _float(run.curvature, "non_convexity"), "trace": _float(run.curvature, "trace"),
            "matrix": str(run.curvature.get("curvature", "")), "loss": str(run.curvature.get("loss", "")),
            "examples": run.curvature.get("examples"), "precision": str(run.curvature.get("precision", "")),
            "run": run.run_id,
        }
        for run in study.runs
        if run.curvature
    ]  # fmt: skip
    if not lines:
        return Missing(
            "curvature", title, "No run has eigenvalues; compute them with: robustflat hessian run=<folder>."
        )
    frame = pd.DataFrame(lines).astype({"seed": "Int64", "examples": "Int64"})
    caption = "Largest eigenvalue and non-convexity, the ratio of the spectrum's ends (Li et al., NeurIPS 2018)."
    return table_of(frame.dropna(axis=1, how="all"), "curvature", title, caption)


def _float(values: Mapping[str, object], key: str) -> float:
    found = values.get(key)
    return float(found) if isinstance(found, int | float) else math.nan


def compute_table(study: Study) -> ReportTable | Missing:
    """What every phase of every run cost."""
    title = "Compute"
    parts = [
        run.ledger.reindex(columns=list(LEDGER_COLUMNS)).assign(model=run.label, seed=run.seed, run=run.run_id)
        for run in study.runs
        if len(run.ledger)
    ]
    if not parts:
        return Missing("compute", title, "No run has a compute ledger.")
    frame = pd.concat(parts, ignore_index=True)[["model", "seed", *LEDGER_COLUMNS, "run"]]
    frame = frame.astype({"seed": "Int64"} | {name: "float64" for name in LEDGER_COLUMNS[1:]})
    frame.columns = pd.Index([str(name).replace("_", " ") for name in frame])
    caption = "Forward and backward passes in batches, peak memory in MiB, by phase."
    return table_of(frame, "compute", title, caption, filters=True)


def warnings_of(study: Study) -> list[str]:
    """Sentences of the sanity checks, each with its run; equal sentences of several runs are told once."""
    runs: dict[str, list[str]] = {}
    for run in study.runs:
        for sentence in run.warnings:
            runs.setdefault(sentence, []).append(run.label if run.seed is None else f"{run.label}, seed {run.seed}")
    return [f"{_listed(names)}: {sentence}" for sentence, names in runs.items()]


def _listed(names: Sequence[str], most: int = 5) -> str:
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")
