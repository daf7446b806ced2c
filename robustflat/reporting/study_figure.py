"""The figure of a study for a README or a paper: robust loss against average- and worst-case flatness."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from robustflat.reporting.correlation import Correlation
from robustflat.reporting.correlation_result import plural
from robustflat.reporting.drawing import Drawing, Points
from robustflat.reporting.figures import draw, plain_text, shortened
from robustflat.reporting.findings import findings
from robustflat.reporting.records import Study
from robustflat.reporting.study_plots import Material, main_drawings

HALO = withStroke(linewidth=2, foreground="white")

MOST_NAMES = 15
"""Marks up to which each carries its name; of more, only the outermost do."""

EDGES = 3
"""Of many marks, so many at each end of either axis carry their names."""


def study_figure(study: Study) -> Figure:
    """RLoss against average-case (left) and worst-case flatness (right) of the runs of a study.

    Bars are one standard error, the line is least squares with its 95 % band, titles tell the correlation with its
    95 % interval. A panel whose numbers are missing says so.
    """
    material = Material(study)
    found = findings(material)
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, drawing, results in zip(panels, main_drawings(material), (found.average, found.worst), strict=True):
        if isinstance(drawing, Drawing):
            draw(drawing, axes)
            _name_marks(drawing, axes)
            axes.set_title(_title(results), fontsize=9)
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{drawing.title}:\n{drawing.reason}", ha="center", va="center", wrap=True)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }  # fmt: skip
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=len(handles), frameon=False,
                      fontsize=8)  # fmt: skip
    return figure


def _title(results: Sequence[Correlation]) -> str:
    told = []
    for result in results:
        ends = "" if math.isnan(result.low) else f" [{result.low:.2f}, {result.high:.2f}]"
        told.append(f"{result.method} {result.value:.2f}{ends}" if result.defined else f"{result.method} not defined")
    first = results[0]
    units = "" if first.n == first.units else f" of {plural(first.units, first.unit)}"
    return f"{', '.join(told)}\nn = {first.n}{units}"


def _name_marks(drawing: Drawing, axes: Axes) -> None:
    """Labels beside the marks; of many marks the outermost. Seeds of one model share a label."""
    marks: dict[str, tuple[float, float]] = {}
    for item in drawing.items:
        if isinstance(item, Points):
            for label, x, y in zip(item.labels, item.x, item.y, strict=True):
                marks.setdefault(label.split("\n")[0], (x, y))
    named = list(marks)
    if len(marks) > MOST_NAMES:
        orders = [sorted(marks, key=lambda name, axis=axis: marks[name][axis]) for axis in (0, 1)]  # type: ignore[misc]
        named = list(dict.fromkeys(name for order in orders for name in (*order[:EDGES], *order[-EDGES:])))
    taken: list[tuple[float, float]] = []
    middle = sum(axes.get_xlim()) / 2
    for name in named:
        place = axes.transAxes.inverted().transform(axes.transData.transform(marks[name]))
        # Two names within a line's height and a name's width of each other would lie on one another.
        if any(abs(place[0] - x) < 0.22 and abs(place[1] - y) < 0.035 for x, y in taken):
            continue
        taken.append((float(place[0]), float(place[1])))
        right = marks[name][0] <= middle
        axes.annotate(plain_text(shortened(name)), marks[name], xytext=(5 if right else -5, 4), fontsize=6.5,
                      textcoords="offset points", path_effects=[HALO], ha="left" if right else "right")  # fmt: skip
