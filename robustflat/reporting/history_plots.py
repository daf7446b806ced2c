"""What happens over epochs and along lines in weight space: learning curves, flatness over epochs, landscapes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from robustflat.reporting.drawing import Drawing, Item, Line, Missing, Points, Style, style_of
from robustflat.reporting.quantities import all_rows
from robustflat.reporting.records import RunRecord, Study

_HINT = " Measure them with: python evaluate.py run=<folder> evaluation=epochs."
_PREFIXES = ("evaluation/", "")
_CURVES = {
    "test_robust_loss": ("RLoss over epochs, test", "RLoss (nats)", 1.0),
    "train_robust_loss": ("RLoss over epochs, train", "RLoss (nats)", 1.0),
    "test_robust_error": ("RErr over epochs, test", "RErr (%)", 100.0),
}


def learning_curves(study: Study) -> list[Drawing | Missing]:
    """RLoss on test and train and RErr on test over epochs, each label's mean over seeds, marked where it is lowest."""
    return [_curve(study, column, *texts) for column, texts in _CURVES.items()]


def _curve(study: Study, column: str, title: str, label: str, scale: float) -> Drawing | Missing:
    key = f"curve_{column}"
    series = {
        name: mean
        for name, runs in _by_label(study).items()
        if (mean := _mean_history(runs, column)) is not None
    }  # fmt: skip
    if not series:
        return Missing(key, title, f"No run has a learning curve of {label.split(' (')[0]} ({column} in its history).")
    items: list[Item] = []
    lows, early = [], 0
    for index, (name, values) in enumerate(series.items()):
        style = style_of(index)
        epochs, heights = tuple(map(float, values.index)), tuple(float(v) * scale for v in values)
        items.append(Line(name, epochs, heights, Style(style.colour, index // 6)))
        if column.startswith("test") and len(values) > 1:
            best = int(np.argmin(heights))
            early += epochs[best] < epochs[-1]
            lows.append((epochs[best], heights[best], f"{name}\nlowest at epoch {epochs[best]:g}: {heights[best]:.3g}"))
    if lows:
        x, y, texts = zip(*lows, strict=True)
        items.append(Points("lowest: where early stopping would stop", x, y, Style(None, 7), labels=texts))
    reading = f"Lines of {len(series)} models."
    if lows:
        reading += f" {early} of {len(lows)} are lowest before the last epoch: they overfit robustly from there on."
    return Drawing(key, title, f"Mean over seeds of the periodic evaluations during training ({column}).",
                   reading, "epoch", label, tuple(items))  # fmt: skip


def _by_label(study: Study) -> dict[str, list[RunRecord]]:
    """Label -> its runs; failed ones, which may have ended early, only where there are no others."""
    made: dict[str, list[RunRecord]] = {}
    for run in study.runs:
        made.setdefault(run.label, []).append(run)
    return {label: [run for run in runs if run.status != "failed"] or runs for label, runs in made.items()}


def _mean_history(runs: list[RunRecord], column: str) -> pd.Series[float] | None:
    """Epoch -> mean over runs at the epochs that all have; None if no run has the column."""
    found = []
    for run in runs:
        name = next((f"{prefix}{column}" for prefix in _PREFIXES if f"{prefix}{column}" in run.history), None)
        name = name or (column.replace("_", "/", 1) if column.replace("_", "/", 1) in run.history else None)
        if name is None or "epoch" not in run.history:
            continue
        values = run.history.set_index("epoch")[name].astype("float64").replace([math.inf, -math.inf], math.nan)
        values = values.dropna().groupby(level=0).last()
        if len(values):
            found.append(values)
    if not found:
        return None
    joined = pd.concat(found, axis=1, join="inner")
    return joined.mean(axis=1) if len(joined) else None


def flatness_over_epochs(study: Study) -> list[Drawing | Missing]:
    """Average- and worst-case flatness of snapshots over epochs, and RLoss against flatness along training."""
    made: list[Drawing | Missing] = [_measure_over_epochs(study, "average"), _measure_over_epochs(study, "worst")]
    return [*made, _path(study)]


def _snapshots(study: Study, kind: str, metric: str, word: str = "") -> pd.DataFrame:
    """Columns label, epoch, value: mean over seeds of numbers of snapshots on test examples."""
    rows = all_rows(replace(study, runs=[run for run in study.runs if run.status != "failed"]))
    empty = pd.DataFrame(columns=["label", "epoch", "value"])
    if rows.empty:
        return empty
    kept = rows[(rows["kind"] == kind) & (rows["metric"] == metric) & rows["epoch"].notna()]
    kept = kept[kept["split"].str.startswith("test") & ~kept["split"].str.contains(" - ", regex=False)]
    kept = kept[kept["checkpoint"].str.startswith("epoch_") | (kept["checkpoint"] == study.checkpoint)]
    if kind == "flatness":
        kept = kept[(kept["loss"] == "robust") & kept["measure"].str.contains(word)]
    snapshots = kept[kept["checkpoint"].str.startswith("epoch_")]
    if snapshots.empty:
        return empty
    kept = kept[kept["measure"] == snapshots["measure"].value_counts(sort=False).idxmax()]
    return kept.groupby(["label", "epoch"], sort=False)["value"].mean().reset_index().sort_values("epoch")


def _measure_over_epochs(study: Study, word: str) -> Drawing | Missing:
    key, title = f"epochs_{word}", f"{word.capitalize()}-case flatness over epochs"
    table = _snapshots(study, "flatness", "flatness", word)
    if table.empty:
        hint = _HINT if word == "average" else ""  # the evaluation has no worst case
        return Missing(key, title, f"No run has {word}-case flatness of its snapshots.{hint}")
    items = []
    for index, (name, part) in enumerate(table.groupby("label", sort=False)):
        style = style_of(index)
        x, y = tuple(part["epoch"].astype(float)), tuple(part["value"].astype(float))
        items.append(Points(str(name), x, y, style, tuple(f"{name}, epoch {e:g}: {v:.3g}" for e, v in
                                                          zip(x, y, strict=True)), joined=True))  # fmt: skip
    reading = f"Lines of {len(items)} models between epochs {table['epoch'].min()} and {table['epoch'].max()}."
    return Drawing(key, title, "Flatness of the robust loss at snapshots of training, mean over seeds.", reading,
                   "epoch", f"{word}-case flatness (nats)", tuple(items))  # fmt: skip


def _path(study: Study) -> Drawing | Missing:
    key, title = "epochs_path", "RLoss against average-case flatness along training"
    flat = _snapshots(study, "flatness", "flatness", "average")
    loss = _snapshots(study, "attack", "robust_loss")
    both = flat.merge(loss, on=["label", "epoch"], suffixes=("_flat", "_loss")) if len(flat) and len(loss) else flat[:0]
    if both.empty:
        return Missing(key, title, f"No snapshot has both RLoss and average-case flatness.{_HINT}")
    items = []
    for index, (name, part) in enumerate(both.groupby("label", sort=False)):
        x, y = tuple(part["value_flat"].astype(float)), tuple(part["value_loss"].astype(float))
        labels = tuple(f"{name}, epoch {epoch}" for epoch in part["epoch"])
        items.append(Points(str(name), x, y, style_of(index), labels, joined=True))
    reading = f"One path for each of {len(items)} models, from the first snapshot to the last."
    return Drawing(key, title, "Each path joins the snapshots of one model in the order of training.", reading,
                   "average-case flatness (nats)", "RLoss (nats)", tuple(items))  # fmt: skip


def landscapes(study: Study) -> list[Drawing | Missing]:
    """Loss along lines for every kind of landscape that the records hold: mean over lines, shaded to the largest."""
    kinds = list(dict.fromkeys(kind for run in study.runs for kind in run.landscapes))
    if not kinds:
        reason = "No run has a landscape; make one with: robustflat landscape run=<folder>."
        return [Missing("landscapes", "Loss landscapes", reason)]
    return [_landscape(study, kind, number) for number, kind in enumerate(kinds)]


def _landscape(study: Study, kind: str, number: int) -> Drawing | Missing:
    key, title = f"landscape_{number}", f"Loss landscape: {kind}"
    items: list[Item] = []
    for run in study.runs:
        lines = run.landscapes.get(kind)
        if lines is None or lines.losses.dim() != 2 or lines.losses.shape[1] != len(lines.steps):
            continue
        losses = lines.losses.double()
        style = style_of(len(items))
        name = run.label if run.seed is None else f"{run.label}, seed {run.seed}"
        mean, top = tuple(losses.mean(dim=0).tolist()), tuple(losses.amax(dim=0).tolist())
        band = (tuple(losses.amin(dim=0).tolist()), top) if len(losses) > 1 else ((), ())
        items.append(Line(name, tuple(lines.steps.tolist()), mean, Style(style.colour, len(items) // 6), *band))
    if not items:
        return Missing(key, title, f"The landscapes of '{kind}' hold no lines.")
    return Drawing(key, title, "Line: mean over directions; band: lowest to highest direction.",
                   f"Losses of {len(items)} networks along lines through their weights.",
                   "step relative to the norm of the weights", "loss (nats)", tuple(items))  # fmt: skip
