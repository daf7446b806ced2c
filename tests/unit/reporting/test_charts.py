"""What can be seen of a figure: by plotly's description and by the artists of matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

from robustflat.reporting.charts import PAGE, chart
from robustflat.reporting.drawing import Bars, Drawing, Line, Missing
from robustflat.reporting.figures import figure_of, save
from robustflat.reporting.findings import measures
from robustflat.reporting.records import Study
from robustflat.reporting.study_figure import study_figure
from robustflat.reporting.study_plots import Material
from tests.unit.reporting.made_up import record


def drawing(*items: Line | Bars) -> Drawing:
    return Drawing("key", "title", "caption", "reading", "x", "y", items)


def test_hatched_bars_stand_out_from_the_page() -> None:
    bars = Bars(("a", "b"), (0.5, 0.4), (0.1, 0.2), (0.7, 0.6), (True, False), ("a", "b"))
    marker = chart(drawing(bars))[0]["data"][0]["marker"]
    # Without fillmode "overlay", plotly leaves the ground between the hatches clear.
    assert list(marker["pattern"]["shape"]) == ["", "/"] and "fillmode" not in marker["pattern"]
    assert marker["color"] == marker["pattern"]["fgcolor"] == marker["line"]["color"] != PAGE


def test_a_line_of_one_point_can_be_seen() -> None:
    one, two = Line("one", (1.0,), (2.0,)), Line("two", (1.0, 2.0), (2.0, 3.0))
    traces = chart(drawing(one, two))[0]["data"]
    assert [trace["mode"] for trace in traces] == ["markers", "lines"]
    assert traces[0]["marker"]["color"] == traces[0]["line"]["color"]
    drawn = figure_of(drawing(one, two)).axes[0].lines
    assert [line.get_marker() for line in drawn] == ["o", "None"]


def test_names_of_any_length_leave_room_for_what_they_name(tmp_path: Path) -> None:
    """Runs of a report are named by their overrides, paths included; matplotlib warns where no room is left."""
    name = "arrays-at dataset.source.train_images=/somewhere/far/away.npz " * 5 + "seed=1"
    bars = Bars((name, "b"), (0.5, 0.4), (0.1, 0.2), (0.7, 0.6), (True, False), (name, "b"))
    for item in (Line(name, (1.0, 2.0), (2.0, 3.0)), bars):
        figure = figure_of(drawing(item))
        assert len(save(figure, tmp_path, "picture")) == 2
        (axes,) = figure.axes
        legend = axes.get_legend()
        texts = axes.get_yticklabels() if legend is None else legend.get_texts()
        told = [text.get_text() for text in texts]
        assert any(text.startswith("arrays-at") and text.endswith("seed=1") for text in told)
    study = Study(
        "x", "?", [record(f"{i} {name}", "M", 0, 0.2 + 0.1 * i, 2.0 + i, run_id=f"{i:08x}") for i in range(4)]
    )
    save(study_figure(study), tmp_path, "study")


def test_bars_without_an_interval_say_so() -> None:
    runs = [record(f"M {i}", "M", 0, 0.2 + 0.1 * i, 2.0 + i, run_id=f"{i:08x}") for i in range(4)]
    bars, _ = measures(Material(Study("x", "?", runs)))
    assert not isinstance(bars, Missing)
    (item,) = (item for item in bars.items if isinstance(item, Bars))
    assert all(math.isnan(low) for low in item.low)
    assert all("1.00 without an interval" in label and "nan" not in label for label in item.labels)
