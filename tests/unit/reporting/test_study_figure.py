"""The static figure of a study: what its titles say, whatever names and gaps there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from robustflat.reporting.figures import save
from robustflat.reporting.records import Study
from robustflat.reporting.study_figure import study_figure
from tests.unit.reporting.made_up import HOSTILE, failed, study


def test_titles_tell_correlation_interval_and_count() -> None:
    figure = study_figure(study(8, 2, hostile=False, full=False))
    titles = [axes.get_title() for axes in figure.axes]
    # Intervals are over what is independent, which seeds are not.
    assert all(title.startswith("Pearson 0.9") and title.endswith("n = 16 of 8 configurations") for title in titles)
    single = study_figure(study(8, 1, hostile=False, full=False))
    assert all(axes.get_title().endswith("n = 8") for axes in single.axes)
    assert [axes.get_xlabel().split(" (")[0] for axes in figure.axes] == [
        "average-case flatness",
        "worst-case flatness",
    ]


def test_few_models_carry_their_names() -> None:
    figure = study_figure(study(6, 1, hostile=False, full=False))
    assert {text.get_text() for text in figure.axes[0].texts} <= {f"Method {i} {j}" for i in (0, 1) for j in (1, 2, 3)}
    assert len(figure.axes[0].texts) >= 3


def test_hostile_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    figure = study_figure(study(4, 1, full=False))
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert HOSTILE[0] in shown
    assert any(r"\$x_1\$" in text for text in shown)  # escaped: no formula
    svg, png = save(figure, tmp_path, "study")
    assert "<script" not in svg.read_text() and png.stat().st_size > 0


def test_without_numbers_it_says_so() -> None:
    for runs in ([], [failed()]):
        figure = study_figure(Study("Nothing", "?", runs))
        assert all("RLoss against" in axes.texts[0].get_text() for axes in figure.axes)


def test_the_legend_names_the_groups_of_either_panel() -> None:
    made = study(9, 1, hostile=False, full=False)
    # The right panel lacks the last models, the left one the first.
    lacking = [
        replace(run, table=run.table[run.table["measure"] != ("average" if index < 3 else "worst")])
        if not 3 <= index < 6 else run
        for index, run in enumerate(made.runs)
    ]  # fmt: skip
    (legend,) = study_figure(replace(made, runs=lacking)).legends
    assert {"good", "average", "poor"} <= {text.get_text() for text in legend.get_texts()}
