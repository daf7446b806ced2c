"""Tables of a report: what the page shows, and the frames that its downloads hold in full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from robustflat.reporting.correlation_result import plural
from robustflat.reporting.drawing import Missing
from robustflat.reporting.numbers import DASH, number, with_error
from robustflat.reporting.quantities import Quantity, measures_of
from robustflat.reporting.records import LEDGER_COLUMNS, RunRecord, Study
from robustflat.reporting.study_plots import Material

_RUN_QUANTITIES = (
    "error", "robust_error", "robust_loss", "train_robust_error", "train_robust_loss", "gap_robust_error",
    "gap_robust_loss", "average", "worst", "average_clean", "worst_clean", "stopped_robust_error",
    "stopped_robust_loss", "stopped_average",
)  # fmt: skip

_SAID = ("measure", "split", "checkpoint", "epoch", "count", "norm", "epsilon", "radius", "loss", "protocol")
_SAID_OF_RUN = ("precision", "version", "key")


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
    frame: pd.DataFrame,
    key: str,
    title: str,
    caption: str = "",
    *,
    digits: int = 4,
    filters: bool = False,
    deferred: bool = False,
) -> ReportTable:
    """A table that shows a frame as it is: floats with some significant digits, missing values as a dash."""
    kinds = pd.api.types
    numeric = tuple(kinds.is_numeric_dtype(kind) and not kinds.is_bool_dtype(kind) for kind in frame.dtypes)
    columns = [[_cell(value, is_number, digits) for value in frame.iloc[:, i]] for i, is_number in enumerate(numeric)]
    rows = tuple(zip(*columns, strict=True)) if len(frame) else ()
    return ReportTable(key, title, caption, tuple(map(str, frame.columns)), numeric, rows, frame, filters, deferred)


def _cell(value: object, numeric: bool, digits: int = 4) -> Cell:
    if value is None or value is pd.NA or value != value:
        return Cell(DASH, "" if numeric else None)
    if numeric and isinstance(value, float):
        return Cell(number(value, digits), value if math.isfinite(value) else "")
    return Cell(str(value), int(str(value)) if numeric else None)


def runs_table(material: Material) -> ReportTable | Missing:
    """All runs with their main numbers; sorts and filters by value, downloads values and standard errors."""
    title, study = "All runs", material.study
    if not study.runs:
        return Missing("runs", title, "There are no runs.")
    frame = material.all
    shown = [key for key in _RUN_QUANTITIES if key in frame and frame[key].notna().any()]
    texts = {"label": "model", "family": "family", "group": "group", "seed": "seed", "status": "status",
             "experiment": "experiment", "run_id": "run"}  # fmt: skip
    lines = frame.to_dict("records")
    rows = tuple(
        (*(_cell(line[text], text == "seed") for text in texts),
         *(_with_error_cell(line[key], line[f"{key}_stderr"]) for key in shown))
        for line in lines
    )  # fmt: skip
    full = frame[[*texts, *(key + ending for key in shown for ending in ("", "_stderr"))]]
    numeric = (*(text == "seed" for text in texts), *(True for _ in shown))
    caption = (
        f"{plural(len(frame), 'run')}. Press a heading to sort; type into the fields to filter, numbers too. ± is one "
        "standard error over examples (errors, losses), draws or restarts (flatness)."
    )
    columns = (*texts.values(), *(material.title(key) for key in shown))
    return ReportTable("runs", title, caption, columns, numeric, rows, full, filters=True)


def _with_error_cell(value: float, error: float) -> Cell:
    return Cell(with_error(value, error), "" if math.isnan(value) else float(value))


def provenance_table(material: Material) -> ReportTable | Missing:
    """One line for each number of the page: which run and network, how it was measured, by which code."""
    title = "Provenance of every number"
    wanted = [*material.quantities.values(), *measures_of(material.pool)]
    told = dict.fromkeys(quantity.name for quantity in wanted)
    firsts = [next(quantity for quantity in wanted if quantity.name == name) for name in told]
    lines = [
        _provenance(material.study.runs[int(str(position))], quantity, row)
        for quantity in firsts
        for position, row in material.pool.find(quantity).to_dict("index").items()
    ]
    if not lines:
        return Missing("provenance", title, "No run has a number yet.")
    full = pd.DataFrame(lines).astype({"seed": "Int64", "epoch": "Int64", "count": "Int64"})
    always = ("run", "model", "number", "value", "stderr")
    same = [name for name in full if name not in always and full[name].nunique(dropna=False) == 1]
    known = {
        str(name): full[name].iloc[0] for name in same if pd.notna(full[name].iloc[0]) and full[name].iloc[0] != ""
    }
    caption = f"{plural(len(full), 'number')}."
    if known:
        caption += " The same for all: " + ", ".join(f"{name} {_plain(value)}" for name, value in known.items()) + "."
    made = table_of(full.drop(columns=same), "provenance", title, caption, filters=True, deferred=True)
    return replace(made, frame=full)


def _provenance(run: RunRecord, quantity: Quantity, row: Mapping[Any, Any]) -> dict[str, object]:
    value, error = (float(row[n]) * quantity.scale if pd.notna(row[n]) else math.nan for n in ("value", "stderr"))
    said = {name: row[name] for name in (*_SAID, *_SAID_OF_RUN)}
    return {
        "run": run.run_id, "model": run.label, "seed": run.seed, "number": quantity.title, "value": value,
        "stderr": error, **said, "commit": _commit(run.provenance),
    }  # fmt: skip


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
