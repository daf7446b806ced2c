"""The verdict of a report says what its intervals say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from robustflat.reporting.answer import answer_of
from robustflat.reporting.correlation import Correlation
from robustflat.reporting.findings import Findings
from robustflat.reporting.study_plots import Material
from tests.unit.reporting.made_up import study

CLEAR, WEAK, NONE, AGAINST = (0.7, 0.9), (0.2, 0.5), (-0.2, 0.5), (-0.8, -0.3)
UNKNOWN = (math.nan, math.nan)


def verdict(average: tuple[float, float], worst: tuple[float, float] | None) -> str:
    """The first paragraph for intervals of the two correlations; None: not measured."""

    def found(word: str, ends: tuple[float, float] | None) -> tuple[Correlation, ...]:
        x = f"{word}-case flatness"
        if ends is None:
            return (Correlation("Pearson", x, "RLoss", why="Missing."),)
        return (Correlation("Pearson", x, "RLoss", sum(ends) / 2, *ends, n=12, units=12),)

    made = Findings(found("average", average), found("worst", worst), ())
    return answer_of(Material(study(3, 1, full=False)), made).paragraphs[0]


@pytest.mark.parametrize(
    ("average", "worst", "begins", "ends"),
    [
        (CLEAR, CLEAR, "Yes", "the relation is there, too."),
        (CLEAR, WEAK, "Yes", "the relation is there, but weaker."),
        (CLEAR, NONE, "Yes", "no relation is clear."),
        (CLEAR, AGAINST, "Yes", "the flatter the minimum, the higher the robust loss."),
        (NONE, CLEAR, "Not clear", "For worst-case flatness, the flatter the minimum, the lower the robust loss."),
        (NONE, AGAINST, "Not clear", "For worst-case flatness, the flatter the minimum, the higher the robust loss."),
        (AGAINST, CLEAR, "No", "For worst-case flatness, the flatter the minimum, the lower the robust loss."),
        (AGAINST, AGAINST, "No", "it is the other way round, too."),
        (CLEAR, None, "Yes", "the flatter the minimum (average case), the lower the robust loss."),
        (UNKNOWN, CLEAR, "Yes", "the flatter the minimum (worst case), the lower the robust loss."),
    ],
)
def test_the_verdict_of_two_intervals(
    average: tuple[float, float], worst: tuple[float, float] | None, begins: str, ends: str
) -> None:
    text = verdict(average, worst)
    assert text.startswith(begins) and text.endswith(ends)


def test_facts_name_what_differs_between_the_quantities() -> None:
    made = study(3, 1, full=False)
    fewer = [
        replace(run, table=run.table.assign(count=run.table["count"].mask(run.table["kind"] == "flatness", 100)))
        for run in made.runs
    ]
    found = Findings((Correlation("Pearson", "x", "y"),), (Correlation("Pearson", "x", "y"),), ())
    same, other = (dict(answer_of(Material(replace(made, runs=runs)), found).facts) for runs in (made.runs, fewer))
    assert same["Examples"] == "1000 (test[:1000])" and same["Threat model"] == "L-infinity, radius 8/255"
    assert "RLoss: 1000 (test[:1000])" in other["Examples"]
    assert "average-case flatness: 100 (test[:1000])" in other["Examples"]


def test_what_does_not_belong_together_is_told() -> None:
    made = study(4, 1, full=False, dataset="")
    plain = [
        replace(run, provenance={"data": "data      digits: 1 x 8 x 8 uint8, 10 classes, on cpu"}) for run in made.runs
    ]
    other = replace(plain[0], provenance={"data": "data      cifar10: 3 x 32 x 32 uint8"})
    wider = replace(plain[1], table=plain[1].table.assign(epsilon=0.3))
    found = Findings((Correlation("Pearson", "x", "y"),), (Correlation("Pearson", "x", "y"),), ())
    alike, mixed = (
        answer_of(Material(replace(made, runs=runs)), found) for runs in (plain, [other, wider, *plain[2:]])
    )
    assert dict(alike.facts)["Data set"] == "digits" and not any("several" in text for text in alike.cautions)
    assert dict(mixed.facts)["Data set"] == "cifar10, digits"
    assert sum("several data sets (cifar10, digits)" in text for text in mixed.cautions) == 1
    assert sum("several threat models" in text for text in mixed.cautions) == 1


def test_a_caution_where_flatness_is_of_several_radii() -> None:
    made = study(4, 1, hostile=False)
    table = made.runs[0].table
    narrow = replace(made.runs[0], table=table.assign(radius=table["radius"].where(table["measure"] != "worst", 0.001)))
    found = Findings((Correlation("Pearson", "x", "y"),), (Correlation("Pearson", "x", "y"),), ())
    alike, mixed = (
        answer_of(Material(replace(made, runs=[run, *made.runs[1:]])), found) for run in (made.runs[0], narrow)
    )
    assert not any("several radii" in text for text in alike.cautions)
    assert [text for text in mixed.cautions if "several radii" in text] == [
        "The worst-case flatness is of several radii or protocols, put together here."
    ]
