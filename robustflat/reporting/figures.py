"""Static figures by matplotlib, the twins of the interactive ones, for papers and the README."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustflat.errors import UserError
from robustflat.reporting.drawing import LIGHT, Arrows, Bars, Drawing, Item, Line, Points, Rule, Style

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_DASHES = ("-", "--", ":", "-.")
_INK = "#222222"
_LEGEND_ROWS = 14
LONGEST = 48
"""Characters of a name in a legend or beside a bar."""

_ENDINGS = (".png", ".svg", ".html", ".pdf", ".jpg")


def figure_of(drawing: Drawing) -> Figure:
    """A figure on a white page, 6.4 inches wide, with a legend beside it where there are many names."""
    rows = max((len(item.names) for item in drawing.items if isinstance(item, Bars)), default=0)
    named = len({item.name for item in drawing.items if not isinstance(item, Bars | Rule) and item.name})
    width = 6.4 + (2.4 * -(-named // 24) if named > _LEGEND_ROWS else 0)
    figure = Figure(figsize=(width, 1.1 + 0.24 * rows if rows else 4.4), layout="constrained")
    axes = figure.subplots()
    draw(drawing, axes)
    if named > _LEGEND_ROWS:
        figure.legend(loc="outside right upper", fontsize=7, frameon=False, ncols=-(-named // 24))
    elif named:
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw(drawing: Drawing, axes: Axes) -> None:
    """Draw into axes that there are, without legend and title."""
    for item in drawing.items:
        _draw(item, axes)
    axes.set(xlabel=plain_text(drawing.x), ylabel=plain_text(drawing.y))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, folder: Path, key: str) -> list[Path]:
    """Write `<key>.svg` and `<key>.png`; see `write`.

    Raises:
        UserError: if a file cannot be written.
    """
    written = [folder / f"{key}.{suffix}" for suffix in ("svg", "png")]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for path in written:
            write(figure, path, dpi=110, salt=key)
            figure.set_layout_engine("none")  # laying out anew takes as long as drawing
    return written


def write(figure: Figure, path: Path, *, dpi: int = 150, salt: str = "robustflat", tight: bool = False) -> None:
    """Write a figure whole or not at all, in the format of the path's ending; equal figures give equal files.

    Args:
        figure: what to write.
        path: file; its folder is made if needed.
        dpi: dots per inch of a raster.
        salt: of the names inside an SVG.
        tight: fit the page to what is drawn, also outside of the figure.

    Raises:
        UserError: if the file cannot be written.
    """
    fit: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.1} if tight else {}
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with replacing(path) as unfinished, matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        # Names of runs may hold signs that the font lacks: a box in the PNG; SVG keeps them as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(unfinished, dpi=dpi, metadata=metadata, **fit)


def with_ending(path: Path | str, ending: str) -> Path:
    """The path with another ending in place of that of a picture; "radius_0.5" keeps its fraction."""
    plain = Path(path)
    return plain.with_name((plain.stem if plain.suffix.lower() in _ENDINGS else plain.name) + ending)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it replaces when it is complete and never before.

    Raises:
        UserError: if it cannot be written.
    """
    make_folder(path.parent)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder if needed.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror or error}.") from error


def _draw(item: Item, axes: Axes) -> None:
    if isinstance(item, Points):
        _points(item, axes)
    elif isinstance(item, Line):
        colour = _colour(item.style)
        shape = _DASHES[item.style.shape % len(_DASHES)] if len(item.x) > 1 else "o"
        axes.plot(item.x, item.y, shape, color=colour, label=legend_label(item.name))
        if item.low:
            axes.fill_between(item.x, item.low, item.high, color=colour, alpha=0.15, linewidth=0)
    elif isinstance(item, Bars):
        _bars(item, axes)
    elif isinstance(item, Arrows):
        _arrows(item, axes)
    elif item.axis == "x":
        axes.axvline(item.at, color="0.5", linestyle=":", linewidth=0.9)
        axes.annotate(plain_text(item.text), (item.at, 1), xycoords=("data", "axes fraction"), fontsize=7, color="0.4",
                      xytext=(2, -2), textcoords="offset points", va="top")  # fmt: skip
    else:
        axes.axhline(item.at, color="0.5", linestyle=":", linewidth=0.9)
        axes.annotate(plain_text(item.text), (1, item.at), xycoords=("axes fraction", "data"), fontsize=7, color="0.4",
                      ha="right", va="bottom")  # fmt: skip


def _points(item: Points, axes: Axes) -> None:
    errors: dict[str, Any] = {}
    if item.x_error and np.isfinite(item.x_error).any():
        errors["xerr"] = np.nan_to_num(item.x_error)
    if item.y_error and np.isfinite(item.y_error).any():
        errors["yerr"] = np.nan_to_num(item.y_error)
    axes.errorbar(
        item.x, item.y, **errors, color=_colour(item.style), label=legend_label(item.name), elinewidth=0.7,
        marker=_MARKERS[item.style.shape % len(_MARKERS)], markersize=5,
        markeredgecolor="white", markeredgewidth=0.5, linestyle="-" if item.joined else "none", linewidth=1.2,
    )  # fmt: skip


def _bars(item: Bars, axes: Axes) -> None:
    places = np.arange(len(item.names))
    values = np.array(item.values)
    spread = np.nan_to_num(np.array([values - np.array(item.low), np.array(item.high) - values])).clip(min=0)
    bars = axes.barh(places, values, xerr=spread, color=LIGHT[0], height=0.6, error_kw={"elinewidth": 1})
    for bar, strong in zip(bars, item.strong, strict=True):
        if not strong:
            bar.set(hatch="////", facecolor="white", edgecolor=LIGHT[0])
    axes.set_yticks(places, [plain_text(shortened(name)) for name in item.names], fontsize=7)
    axes.invert_yaxis()


def _arrows(item: Arrows, axes: Axes) -> None:
    colour = _colour(item.style)
    for x0, y0, x1, y1 in zip(item.x, item.y, item.to_x, item.to_y, strict=True):
        axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 0.9})
    # The arrows do not move the limits of the axes by themselves.
    axes.plot([*item.x, *item.to_x], [*item.y, *item.to_y], "none")
    axes.plot(item.x, item.y, "o", markersize=3, color=colour, label=legend_label(item.name))


def _colour(style: Style) -> str:
    return _INK if style.colour is None else LIGHT[style.colour % len(LIGHT)]


def legend_label(name: str) -> str | None:
    """Names that start with an underscore have no place in a legend of matplotlib, so they get a space before it."""
    text = plain_text(shortened(name))
    return None if not name else f" {text}" if text.startswith("_") else text


def shortened(name: str) -> str:
    """Both ends of a name of more than `LONGEST` characters, such as all settings of a run; it leaves no room."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]} … {name[-LONGEST // 2 :]}"


def plain_text(text: str) -> str:
    """A dollar would start a formula."""
    return text.replace("$", r"\$")
