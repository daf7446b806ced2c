"""Pictures of loss landscapes: several networks on one scale, mean and spread over directions; planes as contours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflat.errors import UserError
from robustflat.reporting.records import Lines

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours: told apart by the colour-blind."""

_FORMATS = (".png", ".svg")


def landscape_lines(
    landscapes: Mapping[str, Lines],
    path: Path | str,
    *,
    title: str = "",
    step_label: str = "step relative to the norm of each layer",
    loss_label: str = "robust cross-entropy (nats)",
    error_label: str = "robust error (%)",
    show_max: bool = True,
) -> list[Path]:
    """Loss and error along directions, one colour per network, all on one scale; as PNG and SVG.

    The thick line is the mean over directions, the band one standard deviation either side (but not beyond the
    lowest and highest direction), the dashed line the maximum.

    Args:
        landscapes: name of the network -> what was measured.
        path: file to write; both .png and .svg are written, whatever its own suffix.
        title: above the picture.
        step_label, loss_label, error_label: of the axes, with units.
        show_max: draw the maximum too, where there are several directions.

    Returns:
        The files written.

    Raises:
        UserError: if there are no landscapes, or more than there are colours.
    """
    if not 1 <= len(landscapes) <= len(COLOURS):
        raise UserError(f"A picture shows 1 to {len(COLOURS)} networks, got {len(landscapes)}.")
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, lines) in zip(COLOURS, landscapes.items(), strict=False):
        steps = lines.steps.numpy()
        _band(left, steps, lines.losses.numpy(), colour, name, show_max)
        _band(right, steps, 100 * lines.errors.numpy(), colour, name, show_max)
    left.set(xlabel=step_label, ylabel=loss_label)
    right.set(xlabel=step_label, ylabel=error_label)
    directions = {len(lines.losses) for lines in landscapes.values()}
    if max(directions) > 1:
        count = str(max(directions)) if len(directions) == 1 else f"up to {max(directions)}"
        note = f"mean +- 1 s.d. of {count} directions" + ("; dashed: maximum" if show_max else "")
        left.plot([], [], " ", label=note)
    for axes in (left, right):
        axes.axvline(0, color="0.6", linestyle=":", linewidth=0.8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    return _saved(figure, path, title)


def landscape_planes(
    landscapes: Mapping[str, Lines],
    path: Path | str,
    *,
    title: str = "",
    step_label: str = "relative step",
    loss_label: str = "robust cross-entropy (nats)",
    levels: int = 16,
) -> list[Path]:
    """Filled contours of the loss on a plane, one panel per network, all on one colour scale; as PNG and SVG.

    Levels are spaced evenly in the logarithm of the loss, so that the basin shows beside high walls; a cross marks the
    network itself.

    Args:
        landscapes: name of the network -> plane with losses (S, S).
        path: see `landscape_lines`.
        title, step_label, loss_label: texts.
        levels: contour levels, >= 2.

    Returns:
        The files written.

    Raises:
        UserError: if there is no plane, or losses are not (S, S).
    """
    if not landscapes:
        raise UserError("There is no plane to show.")
    for name, plane in landscapes.items():
        if plane.losses.shape != (len(plane.steps),) * 2:
            raise UserError(f"The landscape of {name} is no plane: its losses are {tuple(plane.losses.shape)}.")
    everything = np.concatenate([plane.losses.numpy().ravel() for plane in landscapes.values()])
    low, high = max(float(everything.min()), 1e-6), max(float(everything.max()), 2e-6)
    edges = np.geomspace(low, max(high, low * 1.01), levels)
    figure = Figure(figsize=(0.8 + 3.8 * len(landscapes), 3.8), layout="constrained")
    panels = figure.subplots(1, len(landscapes), squeeze=False)[0]
    for axes, (name, plane) in zip(panels, landscapes.items(), strict=True):
        steps = plane.steps.numpy()
        # The first axis of the array is the first direction, drawn to the right.
        heights = plane.losses.numpy().T.clip(edges[0], edges[-1])
        filled = axes.contourf(steps, steps, heights, levels=edges, norm="log", cmap="viridis")
        axes.contour(steps, steps, heights, levels=edges, colors="white", linewidths=0.3)
        axes.plot(0, 0, "x", color="white", markersize=7)
        axes.set(title=name, xlabel=f"{step_label}, direction 1", ylabel=f"{step_label}, direction 2", aspect="equal")
    ticks = edges[:: max(1, levels // 6)]
    bar = figure.colorbar(filled, ax=list(panels), label=loss_label, ticks=ticks)
    bar.ax.minorticks_off()
    bar.ax.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    return _saved(figure, path, title)


def _band(
    axes: Axes,
    steps: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    colour: str,
    name: str,
    show_max: bool,
) -> None:
    mean = values.mean(axis=0)
    axes.plot(steps, mean, color=colour, label=name, linewidth=1.8)
    if len(values) < 2:
        return
    spread = values.std(axis=0, ddof=1)
    low = np.maximum(mean - spread, values.min(axis=0))
    high = np.minimum(mean + spread, values.max(axis=0))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if show_max:
        axes.plot(steps, values.max(axis=0), "--", color=colour, linewidth=0.9)


def _saved(figure: Figure, path: Path | str, title: str) -> list[Path]:
    """Write PNG and SVG beside each other, each replaced only when complete."""
    if title:
        figure.suptitle(title, fontsize=10)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in _FORMATS:
        final = target.with_suffix(suffix)
        unfinished = final.with_name(f".{final.stem}.unfinished{suffix}")
        # Without a date, equal landscapes give equal files.
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(unfinished, dpi=150, metadata=metadata)
        unfinished.replace(final)
        written.append(final)
    return written
