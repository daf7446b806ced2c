"""Pictures of landscapes: what is drawn is the mean, spread and maximum of the arrays."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from robustflat.errors import UserError
from robustflat.reporting.landscape_plots import landscape_lines, landscape_planes, summary


@dataclass
class Measured:
    steps: Tensor
    losses: Tensor
    errors: Tensor


def lines(shift: float) -> Measured:
    steps = torch.linspace(-1, 1, 5, dtype=torch.float64)
    losses = torch.stack([1 + shift * steps**2, 1 + 3 * shift * steps**2])
    return Measured(steps, losses, losses / 10)


def plane() -> Measured:
    steps = torch.linspace(-1, 1, 9, dtype=torch.float64)
    losses = 0.1 + steps[:, None] ** 2 + 3 * steps[None] ** 2
    return Measured(steps, losses, losses / 10)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    seen: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    return seen


def test_mean_band_and_maximum_of_every_network_are_drawn_on_one_scale(drawn, tmp_path) -> None:
    files = landscape_lines({"one": lines(1.0), "two": lines(2.0)}, tmp_path / "new" / "a.png", title="both")
    assert [f.name for f in files] == ["a.png", "a.svg"] and all(f.stat().st_size > 1000 for f in files)
    left, right = drawn[0].axes
    mean, highest = left.lines[0].get_ydata(), left.lines[1].get_ydata()
    assert list(mean) == pytest.approx([3, 1.5, 1, 1.5, 3])
    assert list(highest) == pytest.approx([4, 1.75, 1, 1.75, 4])
    band = left.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1, 4))  # no wider than the directions themselves
    assert list(right.lines[0].get_ydata()) == pytest.approx([30, 15, 10, 15, 30])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert "mean of 2 directions (dashed: maximum" in legend.get_title().get_text()
    assert "nats" in left.get_ylabel() and "%" in right.get_ylabel() and left.get_xlabel()


def test_the_maximum_can_be_what_counts_and_the_caption_is_drawn(drawn, tmp_path) -> None:
    landscape_lines({"one": lines(1.0)}, tmp_path / "a.png", emphasis="max", caption="128 examples")
    thick, dashed = drawn[0].axes[0].lines[:2]
    assert list(thick.get_ydata()) == pytest.approx([4, 1.75, 1, 1.75, 4]) and dashed.get_linestyle() == "--"
    assert "128 examples" in [text.get_text() for text in drawn[0].texts]


def test_curves_differ_in_colour_and_marker(drawn, tmp_path) -> None:
    landscape_lines({str(k): lines(float(k)) for k in range(1, 8)}, tmp_path / "a.png")
    labelled = [line for line in drawn[0].axes[0].lines if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in labelled}) == len({line.get_marker() for line in labelled}) == 7


def test_planes_share_levels_and_show_the_first_direction_to_the_right(drawn, tmp_path) -> None:
    landscape_planes({"one": plane(), "two": plane()}, tmp_path / "b.png")
    first = drawn[0].axes[0]
    assert "direction 1" in drawn[0].get_supxlabel() and "direction 2" in drawn[0].get_supylabel()
    assert [axes.get_title() for axes in drawn[0].axes[:2]] == ["one", "two"]
    levels = [axes.collections[0].levels for axes in drawn[0].axes[:2]]
    assert list(levels[0]) == list(levels[1]) and levels[0][0] == pytest.approx(0.1)
    assert (tmp_path / "b.svg").exists()
    # Half a step to the right the loss is 0.35, upwards 0.85: contours are longest along the first direction.
    ring = next(path for path in first.collections[0].get_paths() if len(path.vertices))
    width, height = np.ptp(ring.vertices, axis=0)
    assert width > 1.5 * height


def test_the_band_is_the_standard_deviation_of_a_sample() -> None:
    values = np.array([[0.0, 1.0], [1.0, 1.0], [5.0, 1.0]])
    found = summary(values)
    assert found.mean.tolist() == [2.0, 1.0] and found.highest.tolist() == [5.0, 1.0]
    spread = statistics.stdev([0.0, 1.0, 5.0])
    assert found.low.tolist() == [0.0, 1.0]  # 2 - 2.6 would lie below the lowest
    assert found.high.tolist() == pytest.approx([2.0 + spread, 1.0])
    assert summary(values[:1]).low.tolist() == [0.0, 1.0]


def test_pictures_that_cannot_be_drawn_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="shows 1 to 7 networks, got 0"):
        landscape_lines({}, tmp_path / "a.png")
    with pytest.raises(UserError, match="no plane to show"):
        landscape_planes({}, tmp_path / "a.png")
    with pytest.raises(UserError, match="is no plane"):
        landscape_planes({"a": lines(1.0)}, tmp_path / "a.png")
