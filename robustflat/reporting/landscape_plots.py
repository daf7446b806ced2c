"""Pictures of loss landscapes: several networks on one scale, mean and spread over directions; planes as contours."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflat.errors import UserError
from robustflat.reporting.figures import legend_label, plain_text, with_ending, write
from robustflat.reporting.records import Lines

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours: told apart by the colour-blind."""

LABELS = ("relative step s", "robust cross-entropy (nats)", "robust error (%)")
"""Of the axes unless others are given: step, loss, error."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One per network, so that curves can be told apart in grey too."""

_FORMATS = (".png", ".svg")


Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Summary(NamedTuple):
    """Over directions at each step, all (S,): mean, maximum, and a band of one standard deviation around the mean.

    The band does not reach beyond the lowest and highest direction; with one direction it has no width.
    """

    mean: Values
    highest: Values
    low: Values
    high: Values


def summary(values: Values) -> Summary:
    """Mean, maximum and band of values (D, S) over D directions."""
    mean, highest = values.mean(axis=0), values.max(axis=0)
    if len(values) < 2:
        return Summary(mean, highest, mean, mean)
    with np.errstate(invalid="ignore"):  # infinite losses have no spread
        spread = values.std(axis=0, ddof=1)
    return Summary(
        mean, highest, np.maximum(mean - spread, values.min(axis=0)), np.minimum(mean + spread, values.max(axis=0))
    )


def require_drawable(landscapes: Mapping[str, Lines], *, plane: bool = False) -> None:
    """Refuse no landscapes, more than there are colours, and, for planes, losses that are not (S, S).

    Raises:
        UserError: saying which.
    """
    if plane and not landscapes:
        raise UserError("There is no plane to show.")
    if not plane and not 1 <= len(landscapes) <= len(COLOURS):
        raise UserError(f"A picture shows 1 to {len(COLOURS)} networks, got {len(landscapes)}.")
    for name, landscape in landscapes.items():
        if plane and landscape.losses.shape != (len(landscape.steps),) * 2:
            raise UserError(f"The landscape of {name} is no plane: its losses are {tuple(landscape.losses.shape)}.")


def positive_range(losses: Values) -> tuple[float, float]:
    """Lowest and highest finite loss, for a logarithmic scale: positive and at least one percent apart."""
    finite = losses[np.isfinite(losses)]
    low = max(float(finite.min()), 1e-6) if finite.size else 1.0
    return low, max(float(finite.max()) if finite.size else low, 1.01 * low)


def band_note(landscapes: Mapping[str, Lines], emphasis: str) -> str:
    """What lines and bands mean, "" with one direction each."""
    counts = {len(lines.losses) for lines in landscapes.values()}
    if max(counts) < 2:
        return ""
    count = str(max(counts)) if len(counts) == 1 else f"up to {max(counts)}"
    line, dashes = ("maximum", "mean") if emphasis == "max" else ("mean", "maximum")
    return f"{line} of {count} directions (dashed: {dashes}; band: mean ± 1 s.d.)"


def landscape_lines(
    landscapes: Mapping[str, Lines],
    path: Path | str,
    *,
    title: str = "",
    caption: str = "",
    labels: tuple[str, str, str] = LABELS,
    emphasis: str = "mean",
) -> list[Path]:
    """Loss and error along directions, one colour per network, all on one scale; as PNG and SVG.

    Args:
        landscapes: name of the network -> what was measured.
        path: file to write; both .png and .svg are written, whatever its own suffix.
        title: above the picture.
        caption: below it.
        labels: of the axes, with units: step, loss, error.
        emphasis: what the thick line is over directions, "mean" or "max"; the other is thin and dashed, and the band is
            one standard deviation either side of the mean.

    Returns:
        The files written.

    Raises:
        UserError: if there are no landscapes, or more than there are colours.
    """
    require_drawable(landscapes)
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, lines) in enumerate(landscapes.items()):
        steps = lines.steps.numpy()
        _curves(left, steps, lines.losses.numpy(), index, name, emphasis)
        _curves(right, steps, 100 * lines.errors.numpy(), index, name, emphasis)
    left.set(xlabel=labels[0], ylabel=labels[1])
    right.set(xlabel=labels[0], ylabel=labels[2])
    for axes in (left, right):
        if all(float(lines.steps[0]) < 0 for lines in landscapes.values()):
            axes.axvline(0, color="0.6", linestyle=":", linewidth=0.8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        highest = float(axes.dataLim.y1)
        axes.set_ylim(0, 1.06 * highest if np.isfinite(highest) and highest > 0 else None)
        axes.margins(x=0.02)
    note = band_note(landscapes, emphasis)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(len(landscapes), 4),
        frameon=False,
        fontsize=10,
        title=note or None,
        title_fontsize=9,
    )
    return _saved(figure, path, title, caption)


def landscape_planes(
    landscapes: Mapping[str, Lines],
    path: Path | str,
    *,
    title: str = "",
    caption: str = "",
    labels: tuple[str, str, str] = LABELS,
    levels: int = 16,
) -> list[Path]:
    """Filled contours of loss and error on a plane, one column per network, all on one colour scale; as PNG and SVG.

    Levels of the loss are spaced evenly in its logarithm, so that the basin shows beside high walls; a cross marks the
    network itself.

    Args:
        landscapes: name of the network -> plane with losses and errors (S, S).
        path, title, caption, labels: see `landscape_lines`.
        levels: contour levels, >= 2.

    Returns:
        The files written.

    Raises:
        UserError: if there is no plane, or losses are not (S, S).
    """
    require_drawable(landscapes, plane=True)
    figure = Figure(figsize=(1.2 + 3.6 * len(landscapes), 7.0), layout="constrained")
    rows = figure.subplots(2, len(landscapes), squeeze=False)
    losses = [plane.losses.numpy() for plane in landscapes.values()]
    edges = np.geomspace(*positive_range(np.concatenate([values.ravel() for values in losses])), levels)
    errors = [100 * plane.errors.numpy() for plane in landscapes.values()]
    error_edges = np.arange(0.0, max(float(e.max()) for e in errors) + 10.0, 5.0)
    for row, values, bounds, label, scale in (
        (rows[0], losses, edges, labels[1], "log"),
        (rows[1], errors, error_edges, labels[2], "linear"),
    ):
        for axes, plane, heights in zip(row, landscapes.values(), values, strict=True):
            steps = plane.steps.numpy()
            # The first axis of the array is the first direction, drawn to the right.
            shown = heights.T.clip(bounds[0], bounds[-1])
            filled = axes.contourf(steps, steps, shown, levels=bounds, norm=scale, cmap="viridis")
            axes.contour(steps, steps, shown, levels=bounds, colors="white", linewidths=0.3)
            axes.plot(0, 0, "x", color="white", markersize=7)
            axes.set_aspect("equal")
        ticks = bounds[:: max(1, len(bounds) // 5)]
        bar = figure.colorbar(filled, ax=list(row), label=label, ticks=ticks)
        bar.ax.minorticks_off()
        bar.ax.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    for axes, name in zip(rows[0], landscapes, strict=True):
        axes.set_title(plain_text(name), fontsize=10)
    figure.supxlabel(f"{labels[0]}, direction 1", fontsize=10)
    figure.supylabel(f"{labels[0]}, direction 2", fontsize=10)
    return _saved(figure, path, title, caption)


def _curves(axes: Axes, steps: Values, values: Values, index: int, name: str, emphasis: str) -> None:
    """Thick line, dashed line and band of one network; lines differ in colour and, for grey print, in markers."""
    over, colour = summary(values), COLOURS[index]
    thick, dashed = (over.highest, over.mean) if emphasis == "max" else (over.mean, over.highest)
    every = max(1, len(steps) // 10)
    axes.plot(
        steps, thick, color=colour, label=legend_label(name), linewidth=1.8, marker=MARKERS[index], markersize=4,
        markevery=(index * every // 3, every),
    )  # fmt: skip
    if len(values) > 1:
        axes.fill_between(steps, over.low, over.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, dashed, "--", color=colour, linewidth=0.9)


def _saved(figure: Figure, path: Path | str, title: str, caption: str) -> list[Path]:
    """Write PNG and SVG beside each other."""
    if title:
        figure.suptitle(title, fontsize=11)
    if caption:
        # Below the axes: the bounding box grows with it, the axes keep their size.
        text = textwrap.fill(plain_text(caption), width=int(16.5 * figure.get_figwidth()))
        figure.text(0.01, -0.01, text, fontsize=8, color="0.3", va="top", ha="left")
    written = [with_ending(path, suffix) for suffix in _FORMATS]
    for file in written:
        write(figure, file, tight=True)
    return written
