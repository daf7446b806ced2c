"""A landscape of one or several networks as PNG, SVG and one interactive HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from robustflat.errors import UserError
from robustflat.reporting.figures import replacing, with_ending
from robustflat.reporting.landscape_html import lines_page, planes_page
from robustflat.reporting.landscape_plots import landscape_lines, landscape_planes
from robustflat.reporting.records import Lines


class Measured(Lines, Protocol):
    """A landscape that knows what it is: see `flatness.landscape_result.LandscapeResult`."""

    @property
    def kind(self) -> str:
        """One of "lines", "plane", "path"."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """All options."""
        ...

    @property
    def step_label(self) -> str:
        """Of the axis, with its unit."""
        ...

    @property
    def loss_label(self) -> str:
        """Of the axis, with its unit."""
        ...

    @property
    def error_label(self) -> str:
        """Of the axis, with its unit."""
        ...


def draw(landscapes: Mapping[str, Measured], path: Path | str, *, title: str = "", caption: str = "") -> list[Path]:
    """Write PNG, SVG and HTML, all networks on one scale.

    Args:
        landscapes: name of the network -> landscape, all of one kind, loss and unit of steps.
        path: file to write, in three formats whatever its suffix.
        title: above the picture.
        caption: below it: how it was made.

    Returns:
        The files written.

    Raises:
        UserError: if there is none, there are too many, they do not belong on one scale, or a file cannot be written.
    """
    if not landscapes:
        raise UserError("There is no landscape to draw.")
    first = next(iter(landscapes.values()))
    for name, other in landscapes.items():
        pairs = [(x.kind, x.step_label, x.loss_label) for x in (first, other)]
        if pairs[0] != pairs[1]:
            raise UserError(
                f"The landscape of {name} does not belong on the scale of the first: {', '.join(pairs[1])} instead "
                f"of {', '.join(pairs[0])}."
            )
    labels = (first.step_label, first.loss_label, first.error_label)
    emphasis = str(first.settings.get("reduction", "mean"))
    facts = {name: {"kind": m.kind, **m.settings} for name, m in landscapes.items()}
    heading = title or "Loss landscape"
    if first.kind == "plane":
        files = landscape_planes(landscapes, path, title=title, caption=caption, labels=labels)
        page = planes_page(landscapes, title=heading, caption=caption, labels=labels, facts=facts)
    else:
        files = landscape_lines(landscapes, path, title=title, caption=caption, labels=labels, emphasis=emphasis)
        page = lines_page(landscapes, title=heading, caption=caption, labels=labels, emphasis=emphasis, facts=facts)
    target = with_ending(path, ".html")
    with replacing(target) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return [*files, target]
