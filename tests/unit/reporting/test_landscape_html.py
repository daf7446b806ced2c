"""The interactive pages hold the measured numbers, load nothing from anywhere, and escape what they are given."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.reporting.landscape_html import lines_page, planes_page
from robustflat.reporting.landscape_pictures import draw

LOADS = re.compile(
    r"""<script[^>]*\ssrc|<link|<iframe|<img|<base|@import|url\(\s*['"]?http|integrity=""", re.IGNORECASE
)
LABELS = ("step", "loss (nats)", "error (%)")


@dataclass
class Measured:
    steps: Tensor
    losses: Tensor
    errors: Tensor
    kind: str = "lines"
    settings: dict[str, Any] = field(default_factory=lambda: {"reduction": "mean", "seed": 7})
    step_label: str = "step"
    loss_label: str = "loss (nats)"
    error_label: str = "error (%)"


def lines() -> Measured:
    steps = torch.linspace(-1, 1, 5, dtype=torch.float64)
    losses = torch.stack([1 + steps**2, 1 + 3 * steps**2])
    return Measured(steps, losses, losses / 10)


def plane() -> Measured:
    steps = torch.linspace(-1, 1, 3, dtype=torch.float64)
    losses = 0.1 + steps[:, None] ** 2 + 3 * steps[None] ** 2 + steps[:, None]
    return Measured(steps, losses, losses / 10, kind="plane")


@pytest.fixture
def drawn(monkeypatch) -> list[go.Figure]:
    seen: list[go.Figure] = []
    to_html = go.Figure.to_html
    monkeypatch.setattr(go.Figure, "to_html", lambda self, *a, **k: (seen.append(self), to_html(self, *a, **k))[1])
    return seen


def own_part(page: str) -> str:
    """The page without the library's own code, in which addresses are text that nothing here calls."""
    start = page.index("<script>")
    return page[:start] + page[page.index("</script>", start) :]


def test_a_page_of_lines_holds_the_numbers_and_loads_nothing(drawn) -> None:
    facts = {"<b>one": {"seed": 7}}
    page = lines_page(
        {"<b>one": lines()},
        title="a < b",
        caption="<script>alert(1)</script>",
        labels=LABELS,
        emphasis="mean",
        facts=facts,
    )
    assert "a &lt; b" in page and "&lt;script&gt;alert" in page and "<td>7</td>" in page
    assert not LOADS.search(own_part(page))
    assert "http://" not in own_part(page) and "https://" not in own_part(page)
    assert page.count("<!DOCTYPE") == 1 and "Plotly.newPlot" in page
    by_name = {trace.name: trace for trace in drawn[0].data if trace.name and trace.xaxis == "x"}
    assert list(by_name["<b>one (mean)"].y) == pytest.approx([3, 1.5, 1, 1.5, 3])
    assert list(by_name["<b>one, maximum"].y) == pytest.approx([4, 1.75, 1, 1.75, 4])
    right = [trace for trace in drawn[0].data if trace.xaxis == "x2" and trace.name == "<b>one (mean)"]
    assert list(right[0].y) == pytest.approx([30, 15, 10, 15, 30])
    assert "nats" in drawn[0].layout.yaxis.title.text and "%" in drawn[0].layout.yaxis2.title.text


def test_planes_show_the_first_direction_to_the_right_as_contour_and_surface(drawn) -> None:
    page = planes_page({"one": plane()}, title="t", caption="c", labels=LABELS, facts={})
    flat, solid = drawn
    assert not LOADS.search(own_part(page)) and "http" not in own_part(page)
    loss = next(trace for trace in flat.data if trace.type == "contour")
    # Plotly's rows go upwards: entry [j, i] is at (x_i, y_j).
    assert loss.customdata[1, 2] == pytest.approx(0.1 + 1 + 1) and solid.data[0].z[1, 2] == pytest.approx(2.1)


def test_pictures_that_do_not_belong_on_one_scale_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no landscape to draw"):
        draw({}, tmp_path / "a.png")
    other = lines()
    other.loss_label = "clean loss"
    with pytest.raises(UserError, match="two does not belong on the scale of the first: lines, step, clean loss"):
        draw({"one": lines(), "two": other}, tmp_path / "a.png")
    files = draw({"one": lines()}, tmp_path / "new" / "a.png", title="t", caption="c")
    assert [f.name for f in files] == ["a.png", "a.svg", "a.html"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.html", "a.png", "a.svg"]
