"""Files of pictures: whole or not at all, under the name that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from robustflat.errors import UserError
from robustflat.reporting.contact_sheet import contact_sheet
from robustflat.reporting.density_plots import density_picture
from robustflat.reporting.drawing import Bars, Drawing, Points
from robustflat.reporting.figures import LONGEST, figure_of, save, with_ending
from robustflat.reporting.landscape_plots import landscape_lines
from robustflat.reporting.plots import training_curves
from tests.unit.reporting.made_up import MadeUpLines

HISTORY = [{"epoch": 1.0, "test_robust_loss": 2.0}, {"epoch": 2.0, "test_robust_loss": 1.0}]
NODES = (np.array([[0.0, 1.0, 5.0]]), np.array([[0.2, 0.5, 0.3]]))


def lines() -> MadeUpLines:
    return MadeUpLines(torch.linspace(-1, 1, 5), torch.ones(2, 5), torch.zeros(2, 5))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "learning curves": lambda path: training_curves([HISTORY], path),
    "density": lambda path: density_picture({"a": NODES}, path),
    "landscape": lambda path: landscape_lines({"a": lines()}, path),
    "contact sheet": lambda path: contact_sheet({"a": torch.zeros(1, 3, 4, 4)}, path),
    "figure of a report": lambda path: save(Figure(), path.parent, path.stem),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_old_picture_and_is_told(
    writer: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "a.png", tmp_path / "a.svg"]
    for file in files:
        file.write_text("old")

    def half(self: Figure, target: Path, **options: object) -> None:
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(UserError, match=r"Cannot write .*: No space left on device"):
        writer(files[0])
    assert [file.read_text() for file in files] == ["old", "old"] and sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_made_is_told(writer: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write into"):
        writer(tmp_path / "file" / "a.png")


def test_a_name_with_a_fraction_is_kept(tmp_path: Path) -> None:
    written = [
        file for radius in ("0.5", "0.25") for file in landscape_lines({"a": lines()}, tmp_path / f"xi_{radius}")
    ]
    assert {file.name for file in written} == {"xi_0.5.png", "xi_0.5.svg", "xi_0.25.png", "xi_0.25.svg"}
    assert [with_ending(f"a.{ending}", ".svg").name for ending in ("png", "SVG", "html", "b")] == [
        *["a.svg"] * 3,
        "a.b.svg",
    ]


def test_marks_of_the_outermost_nodes_stand_on_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **options: (drawn.append(self), target.touch())[1])
    wide = (np.array([[0.0, 10.0, 50.0]]), np.full((1, 3), 1 / 3))  # a peak a third as high as that of the next
    density_picture({"wide": wide, "narrow": (np.zeros((1, 3)), np.full((1, 3), 1 / 3))}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    marks = [line for line in axes.lines if line.get_marker() == "^"]
    assert [float(line.get_xdata()[0]) for line in marks] == [0.0, 50.0, 0.0, 0.0]
    assert all(float(line.get_ydata()[0]) == axes.get_ylim()[0] for line in marks)


@pytest.mark.parametrize("name", [r"cost $\foo{ $ of it", "_hidden"])
def test_names_of_networks_are_shown_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, target, **options: (drawn.append(self), target.touch())[1])
    landscape_lines({name: lines()}, tmp_path / "a.png", caption=name)
    density_picture({name: NODES}, tmp_path / "b.png", title=name)
    shown = [figure.legends or [figure.axes[0].get_legend()] for figure in (drawn[0], drawn[-1])]
    assert [legend.get_texts()[0].get_text().replace(r"\$", "$").strip() for (legend,) in shown] == [name] * 2
    monkeypatch.undo()
    assert landscape_lines({name: lines()}, tmp_path / "a.png", caption=name)[0].stat().st_size > 5000
    assert contact_sheet({name: torch.zeros(1, 3, 4, 4)}, tmp_path / "c.png").stat().st_size > 0
    training_curves([HISTORY], tmp_path / "d.png", title=name)


def test_infinite_losses_are_drawn_around(tmp_path: Path) -> None:
    far = lines()._replace(
        losses=torch.tensor([[1.0, 2.0, 1.0, 2.0, float("inf")], [1.0, 2.0, 1.0, 3.0, float("nan")]])
    )
    assert landscape_lines({"a": far}, tmp_path / "a.png")[0].stat().st_size > 5000


@pytest.mark.parametrize("count", [2, 20])  # a legend inside, and one beside the axes
def test_long_names_leave_room_for_the_axes(count: int, tmp_path: Path) -> None:
    names = [f"digits-at {'trainer.epochs=2 ' * 20} seed={i}" for i in range(count)]
    points = tuple(Points(name, (1.0, 2.0), (1.0, 2.0)) for name in names)
    bars = Bars(tuple(names), *[(1.0,) * count] * 3, (True,) * count)
    for items in (points, (bars,)):
        figure = figure_of(Drawing("key", "title", "caption", "reading", "x", "y", items))
        save(figure, tmp_path, "key")  # matplotlib would warn of axes without room
        axes = figure.axes[0].get_position()
        assert axes.width > 0.3 and axes.height > 0.3
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(set(shown)) == count and max(map(len, shown)) <= LONGEST + 3
