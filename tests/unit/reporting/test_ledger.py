"""Verdicts of the reproduction ledger on runs made up around the paper's numbers."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from robustflat.reporting.bootstrap import Resampling
from robustflat.reporting.comparisons import reproduction
from robustflat.reporting.correlation_ledger import correlation_ledger
from robustflat.reporting.drawing import Missing
from robustflat.reporting.ledger import reproduction_ledger, runs_by_row, verdicts, why_not_comparable
from robustflat.reporting.paper import from_paper
from robustflat.reporting.records import RunRecord, Study
from robustflat.reporting.report_tables import ReportTable
from robustflat.store.tables import as_text


def ours(row: str = "at", shift: float = 0.0, **changes: object) -> RunRecord:
    record = next(record for record in from_paper() if record.experiment == f"iccv21-{row}")
    table = record.table.copy()
    table.loc[table["metric"] == "robust_loss", "value"] += shift
    table.loc[table["metric"] == "robust_loss", "stderr"] = 0.05
    return replace(record, **{"table": table, "provenance": {"data": "data      cifar10: 3 x 32 x 32"}, **changes})


def cell(records: list[RunRecord], quantity: str = "RLoss") -> pd.Series:
    ledger = reproduction_ledger(records)
    return ledger[(ledger["experiment"] == "at") & (ledger["quantity"] == quantity)].iloc[0]


def test_one_run_agrees_or_differs() -> None:
    near, far = cell([ours(shift=0.09)]), cell([ours(shift=0.2)])
    assert near["verdict"] == "agrees" and near["paper"] == 3.91 and near["seeds"] == 1
    assert (near["low"], near["high"]) == pytest.approx((4.0 - 0.098, 4.0 + 0.098), abs=1e-3)
    assert far["verdict"] == "differs by +0.20" and far["difference"] == pytest.approx(0.2)


def test_seeds_widen_the_verdict() -> None:
    seeds = [ours(shift=shift, run_id=str(shift)) for shift in (0.1, 0.2, 0.3)]
    found = cell(seeds)
    # Spread of one training 0.1, so that the mean is 0.2 +- 0.27 and another training +- 0.51 by Student's t.
    assert found["seeds"] == 3 and found["ours"] == pytest.approx(4.11)
    assert found["high"] - found["ours"] == pytest.approx((4.3027**2 * 0.01 / 3 + 0.098**2) ** 0.5, abs=1e-3)
    assert found["verdict"] == "agrees"
    assert cell([ours(shift=shift, run_id=str(shift)) for shift in (0.9, 1.0, 1.1)])["verdict"] == "differs by +1.00"


def test_what_one_training_and_the_last_digit_allow_is_no_difference() -> None:
    # 1.96 x 0.05 = 0.098 by the examples and 0.005 by the printed digit.
    assert cell([ours(shift=0.1025)])["verdict"] == "agrees" and cell([ours(shift=-0.1025)])["verdict"] == "agrees"
    assert cell([ours(shift=0.1035)])["verdict"] == "differs by +0.10"
    assert cell([ours(shift=-0.1035)])["verdict"] == "differs by -0.10"
    # The mean is known to 0.27, but the paper's is one training, which falls within 0.51.
    for shift, verdict in ((0.4, "agrees"), (0.6, "differs by +0.60")):
        seeds = [ours(shift=shift + more, run_id=str(more)) for more in (-0.1, 0.0, 0.1)]
        assert cell(seeds)["low"] > 3.91 and cell(seeds)["verdict"] == verdict


def test_correlations_that_differ_say_on_which_side() -> None:
    records, few = from_paper()[::2], Resampling(resamples=200)
    turned = []
    for record in records:
        table = record.table.copy()
        table.loc[table["metric"] == "flatness", "value"] *= -1
        turned.append(replace(record, table=table))
    found = correlation_ledger(turned, settings=few, methods=("pearson",)).iloc[0]
    assert (
        found["high"] < 0
        and found["verdict"] == f"differs: the paper's {found['paper_same']:.2f} is above our interval"
    )


def test_what_is_missing_or_other_is_said() -> None:
    assert cell([])["verdict"] == "not run" and cell([ours(status="failed")])["verdict"] == "not run"
    assert cell([ours(table=pd.DataFrame())])["verdict"] == "not measured"
    other = ours(experiment="digits-at", provenance={"data": "data      digits: 1 x 8 x 8"})
    assert cell([other])["verdict"] == "other data: not comparable (trained on digits)"
    assert cell([other, ours()])["verdict"] == "agrees"
    assert why_not_comparable(ours(experiment="cifar10-at")) == "experiment cifar10-at"
    table = ours().table.assign(epsilon=0.3)
    assert "epsilon 0.3" in why_not_comparable(ours(table=table))
    averaged = ours("weight_averaging_098")
    assert why_not_comparable(averaged) == ""
    assert why_not_comparable(replace(averaged, part="model")) == "not the averaged weights"
    assert "32 examples" in why_not_comparable(ours(table=ours().table.assign(count=32)))


def test_the_whole_ledger() -> None:
    ledger = reproduction_ledger(from_paper())
    assert len(ledger) == 74 * 17 and (ledger["verdict"] == "agrees").all()
    assert verdicts(ledger) == "Of 1258 numbers of the paper, 1258 agree."
    assert "1258 were not run" in verdicts(reproduction_ledger([]))
    for ending in ("md", "csv", "tex"):
        assert "AT-AWP" in as_text(ledger, ending)
    assert len(reproduction_ledger([], table="table1")) == 19 * 5
    assert all(len(runs) == 1 for runs in runs_by_row(from_paper()).values())


def test_correlations_beside_the_paper() -> None:
    records, few = from_paper(), Resampling(resamples=200)
    whole = correlation_ledger(records, settings=few)
    assert (whole["verdict"] == "agrees").all() and whole["ours"].iloc[0] == pytest.approx(whole["paper_all"].iloc[0])
    # Twice the same networks are clusters, not 148 models.
    doubled = correlation_ledger(
        [*records, *(replace(record, run_id="x" + record.run_id) for record in records)], settings=few
    )
    assert doubled["low"].iloc[0] == pytest.approx(whole["low"].iloc[0], abs=0.05)
    part = correlation_ledger(records[:20], settings=few)
    assert part["models"].iloc[0] == 20 and part["paper_same"].iloc[0] != part["paper_all"].iloc[0]
    others = [replace(record, experiment=f"digits-{index}") for index, record in enumerate(records)]
    assert set(correlation_ledger(others, settings=few)["verdict"]) == {"other data: not comparable"}
    assert set(correlation_ledger([])["verdict"]) == {"not run"}
    assert set(correlation_ledger(records[:1])["verdict"].str[:11]) == {"not defined"}


def test_the_page_has_both_ledgers_where_rows_of_the_paper_were_run() -> None:
    runs = tuple(ours(record.experiment.removeprefix("iccv21-")) for record in from_paper()[:12])
    numbers, correlations = reproduction(Study(title="ours", question="do they agree?", runs=runs, classes=10))
    assert isinstance(numbers, ReportTable) and isinstance(correlations, ReportTable)
    first = correlations.frame.iloc[0]
    assert (first["of"], first["with"], first["coefficient"]) == ("RLoss", "average-case flatness", "pearson")
    assert (first["paper, all 74"], first["models"]) == (pytest.approx(0.847, abs=5e-4), 12)
    (nothing,) = reproduction(Study(title="theirs", question="do they agree?", runs=from_paper(), classes=10))
    assert isinstance(nothing, Missing) and "the paper's own" in nothing.reason
