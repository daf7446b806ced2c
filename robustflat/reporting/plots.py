"""Pictures of a single run, by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflat.reporting.figures import plain_text, write

TRAIN, TEST = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion: told apart by the colour-blind


def training_curves(
    histories: Sequence[Sequence[Mapping[str, float]]],
    path: Path,
    *,
    title: str = "",
    drops: Sequence[float] = (),
) -> None:
    """Robust loss and errors over epochs: mean over runs, with the standard deviation as a band.

    Args:
        histories: for each run (one or several seeds) the rows of its periodic evaluation: epoch, train_robust_loss,
            test_robust_loss, train_robust_error, test_robust_error, test_error.
        path: PNG file to write.
        title: above the picture.
        drops: epochs at which the learning rate drops, marked by dotted lines.

    Raises:
        UserError: if the file cannot be written.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, histories, "train_robust_loss", TRAIN, "train")
    _curve(left, histories, "test_robust_loss", TEST, "test")
    left.set(xlabel="epoch", ylabel="RLoss (cross-entropy on PGD examples, nats)")
    _curve(right, histories, "train_robust_error", TRAIN, "train, robust", 100)
    _curve(right, histories, "test_robust_error", TEST, "test, robust", 100)
    _curve(right, histories, "test_error", TEST, "test, clean", 100, style="--")
    right.set(xlabel="epoch", ylabel="error (%)", ylim=(0, None))
    for axes in (left, right):
        if axes.lines:
            axes.legend(frameon=False)
        for epoch in drops:
            axes.axvline(epoch, color="0.6", linestyle=":", linewidth=0.8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(plain_text(title), fontsize=10)
    write(figure, path)


def _curve(
    axes: Axes,
    histories: Sequence[Sequence[Mapping[str, float]]],
    key: str,
    color: str,
    label: str,
    scale: float = 1.0,
    style: str = "-",
) -> None:
    runs = [{row["epoch"]: row[key] * scale for row in rows if key in row} for rows in histories]
    runs = [run for run in runs if run]
    if not runs:
        return
    epochs = sorted(set.intersection(*(set(run) for run in runs)))
    columns = [[run[e] for run in runs] for e in epochs]
    means = [sum(column) / len(column) for column in columns]
    axes.plot(epochs, means, style, color=color, label=label, linewidth=1.6)
    if len(runs) > 1:
        spreads = [
            (sum((v - m) ** 2 for v in column) / (len(column) - 1)) ** 0.5
            for column, m in zip(columns, means, strict=True)
        ]
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
