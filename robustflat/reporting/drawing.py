"""What a figure shows, whatever draws it: charts.py with plotly, figures.py with matplotlib.

Colours are numbers into a palette that the colour-blind tell apart, and shapes and dashes change along with them, so
that no figure needs colour to be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LIGHT = ("#0072B2", "#C04E00", "#00795A", "#B0568C", "#9A6B00", "#2F87BD", "#666666")
"""Okabe and Ito's colours, darkened to a contrast of at least 3 : 1 on white; the last one is grey."""

DARK = ("#5AB4F0", "#F58A4B", "#2CC79B", "#E79AC6", "#EDB53C", "#9BD3F7", "#A5A5A5")
"""The same, lightened for dark pages."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
"""Shapes of markers, by plotly's names."""

DASHES = ("solid", "dash", "dot", "dashdot")
"""Dashes of lines, by plotly's names."""


@dataclass(frozen=True)
class Style:
    """Number of a colour and of a shape or dash; colour None is that of the text."""

    colour: int | None = None
    shape: int = 0


def style_of(index: int) -> Style:
    """The style of the index-th of many things: no two of the first 42 are alike, neighbours differ in both."""
    return Style(index % (len(LIGHT) - 1), index % (len(SYMBOLS) - 1))


@dataclass(frozen=True)
class Points:
    """Marked points with one standard error; one label each shows under the pointer, one tag each can be searched."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Style = Style()
    labels: tuple[str, ...] = ()
    x_error: tuple[float, ...] = ()
    y_error: tuple[float, ...] = ()
    joined: bool = False
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line, with a band from `low` to `high` where they are given."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Style = Style()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A thin line across the figure at x or y = `at`, with a short text."""

    axis: str
    at: float
    text: str


@dataclass(frozen=True)
class Bars:
    """Lying bars with intervals; those that are not `strong` are hatched or pale."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    strong: tuple[bool, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrows:
    """Arrows from (x, y) to (to_x, to_y)."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    to_x: tuple[float, ...]
    to_y: tuple[float, ...]
    labels: tuple[str, ...]
    style: Style = Style()


Item = Points | Line | Rule | Bars | Arrows


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        key: name of its files and anchor: lower-case letters, digits and "_".
        title: heading.
        caption: what is drawn and how to read it.
        reading: what one sees, in numbers; the alternative text.
        x, y: labels of the axes, with units.
        items: drawn one over the other.
    """

    key: str
    title: str
    caption: str
    reading: str
    x: str
    y: str
    items: tuple[Item, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Missing:
    """A figure or table that cannot be made, and why, in a sentence."""

    key: str
    title: str
    reason: str
