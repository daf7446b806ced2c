"""What stands in a report, in the order of the page."""

from __future__ import annotations

from dataclasses import dataclass

from robustflat.reporting.comparisons import cost_table, parts_table, reproduction
from robustflat.reporting.drawing import Drawing, Missing
from robustflat.reporting.findings import Findings, correlations_table, measures
from robustflat.reporting.history_plots import flatness_over_epochs, landscapes, learning_curves
from robustflat.reporting.records import Study
from robustflat.reporting.report_tables import (
    ReportTable,
    compute_table,
    curvature_table,
    problems_table,
    provenance_table,
    runs_table,
    warnings_of,
)
from robustflat.reporting.study_plots import (
    Material,
    early_stopping,
    error_against_loss,
    main_drawings,
    scatter,
    trajectories,
)


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading.

    Attributes:
        key: anchor.
        title: heading.
        text: a paragraph; "" for none.
        sentences: a list.
        figures, tables: what it shows, or why it cannot.
        highlight: offer to highlight a family in figures.
    """

    key: str
    title: str
    text: str = ""
    sentences: tuple[str, ...] = ()
    figures: tuple[Drawing | Missing, ...] = ()
    tables: tuple[ReportTable | Missing, ...] = ()
    highlight: bool = False


def sections_of(material: Material, found: Findings) -> list[Section]:
    """All sections; each says in a sentence what is missing."""
    study = material.study
    bars, table = measures(material)
    sure = (correlations_table(found), table)
    return [
        Section("flatness", "Flatness and robust loss", figures=main_drawings(material), highlight=True),
        Section("certainty", "How sure, and other measures", figures=(bars,), tables=sure),
        Section("models", "Robust error, families, generalisation gap, early stopping", figures=_models(material)),
        Section(
            "training",
            "During training",
            figures=(*learning_curves(study), *flatness_over_epochs(study)),
            tables=(parts_table(material), cost_table(material)),
        ),
        Section("weights", "Around the weights", figures=tuple(landscapes(study)), tables=(curvature_table(study),)),
        Section("all-runs", "All runs", tables=(runs_table(material), problems_table(study))),
        _warnings(study),
        Section("reproduction", "Reproduction of the paper", tables=reproduction(study)),
        Section("numbers", "Provenance and cost", tables=(provenance_table(material), compute_table(study))),
    ]


def _models(material: Material) -> tuple[Drawing | Missing, ...]:
    gap = "Robust generalisation gap against average-case flatness"
    clean = "RLoss against average-case flatness of the clean loss"
    return (
        error_against_loss(material),
        trajectories(material),
        scatter(material, "gap_average", "average", "gap_robust_loss", title=gap),
        early_stopping(material),
        scatter(material, "rloss_average_clean", "average_clean", "robust_loss", title=clean),
    )


def _warnings(study: Study) -> Section:
    found = warnings_of(study)
    text = "" if found else "The sanity checks of the runs gave no warning."
    if not study.runs:
        text = "There are no runs."
    return Section("warnings", "Warnings of the sanity checks", text=text, sentences=tuple(found))
