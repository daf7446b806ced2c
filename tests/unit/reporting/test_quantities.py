"""Which attack and which measure a report takes its numbers from, on tables where the answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from robustflat.apps.report import study_page
from robustflat.errors import UserError
from robustflat.reporting.drawing import Drawing
from robustflat.reporting.quantities import Pool, group_of, quantities
from robustflat.reporting.records import RunRecord, Study
from robustflat.reporting.study_plots import Material, early_stopping
from robustflat.store.tables import tidy
from tests.unit.reporting.made_up import record, row


def run(number: int, *rows: dict[str, object]) -> RunRecord:
    """A run with the usual rows and further ones, those before the usual ones."""
    made = record(f"M {number}", "M", 0, 0.2 + 0.1 * number, 2.0 + number, run_id=f"{number:08x}")
    return replace(made, table=pd.concat([tidy(rows), made.table], ignore_index=True))


def snapshots(*, last: bool) -> list[dict[str, object]]:
    """The robust loss by a weak attack and flatness from few draws at twenty snapshots, and at the last network."""
    places = [{"checkpoint": f"epoch_{epoch:04}", "epoch": epoch} for epoch in range(5, 105, 5)]
    places += [{"checkpoint": "last"}] if last else []
    weak = [row("x", 0, "attack", "pgd20_once", "robust_loss", 0.1, **place) for place in places]
    return weak + [row("x", 0, "flatness", "average_3", "flatness", 0.1, loss="robust", **place) for place in places]


@pytest.mark.parametrize("last", [False, True])
def test_many_snapshots_do_not_outvote_the_attack_of_the_last_network(last: bool) -> None:
    usual = [run(0), run(1), run(2)]
    material = Material(Study("x", "?", [*usual, run(3, *snapshots(last=last))]))
    assert material.quantities["robust_loss"].name == "pgd20 robust_loss (test) @last"
    assert material.runs["robust_loss"].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert material.quantities["average"].name == "average flatness (test) @last"


def test_autoattack_counts_where_the_networks_compared_have_it() -> None:
    stopped = row("x", 0, "attack", "autoattack", "robust_error", 0.6, checkpoint="early_stopped")
    whole = row("x", 0, "attack", "autoattack", "robust_error", 0.6)
    for rows, attack in (([stopped], "pgd20"), ([stopped, whole], "autoattack")):
        found = quantities(Pool(Study("x", "?", [run(0), run(1, *rows)])))
        assert found["robust_error"].name == f"{attack} robust_error (test) @last"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_edges": (57, 60)}, "between 0 and 1"),
        ({"group_edges": (0.6, 0.57)}, "rising"),
        ({"group_edges": (0.1, 0.2, 0.3, 0.4)}, "up to 3"),
        ({"group_edges": 0.57}, "up to 3"),
        ({"group_edges": ("a",)}, "numbers"),
        ({"notes": "One sentence."}, r"notes=\['One sentence.'\]"),
        ({"classes": 1}, "at least 2"),
        ({"classes": "ten"}, "whole number"),
    ],
)
def test_fields_of_a_study_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        study_page("x", "?", [], fields)


def test_failed_runs_do_not_move_the_edges_of_the_groups() -> None:
    whole = [record(f"M {i}", "M", 0, 0.5, 1.0 + i / 4, run_id=f"{i:08x}") for i in range(6)]
    broken = [
        replace(run, run_id=f"1{run.run_id[1:]}", status="failed", label=f"F {i}") for i, run in enumerate(whole[3:])
    ]
    alone, beside = (Material(Study("x", "?", runs)).runs for runs in (whole, [*whole, *broken]))
    assert alone["group"].nunique() == 3 and beside["group"].tolist() == alone["group"].tolist()


def test_edges_belong_to_the_worse_group_but_the_last_of_three() -> None:
    edges = (57.0, 60.0, 62.8)
    told = [group_of(error, edges) for error in (56.9, 57.0, 59.9, 60.0, 62.8, 62.9)]
    assert told == ["good", "average", "average", "poor", "poor", "worse"]
    assert group_of(50.0, ()) == group_of(math.nan, edges) == ""


def test_models_that_an_arrow_cannot_be_drawn_for_are_counted() -> None:
    runs = [run(number) for number in range(3)]
    bare = [replace(r, table=r.table[(r.table["kind"] != "flatness") | (r.table["checkpoint"] != "early_stopped")])
            for r in runs]  # fmt: skip
    for given, lost in (([runs[0], *bare[1:]], "2 models whose early-stopped flatness is not known left out"),
                        (runs, ""), (bare, "")):  # fmt: skip
        drawing = early_stopping(Material(Study("x", "?", given)))
        assert isinstance(drawing, Drawing)
        assert lost in drawing.reading and bool(lost) == ("left out" in drawing.reading)


def test_the_seeds_told_are_those_that_have_the_number() -> None:
    seeds = [replace(record("a", "A", seed, 0.5, 2.0, run_id=f"{seed:08x}"), label="a") for seed in range(3)]
    seeds[0] = replace(seeds[0], table=seeds[0].table[seeds[0].table["measure"] != "average"])
    for runs, said in ((seeds, "mean of 2 to 3 seeds"), (seeds[1:], "mean of 2 seeds"), (seeds[2:], "1 seed")):
        material = Material(Study("x", "?", runs))
        (text,) = material.texts(material.have("average", "robust_loss", models=True), "average", "robust_loss")
        assert text.split("\n")[1].split(", ")[1] == said
