"""The transcribed tables: spot checks typed from the paper's tables, and statistics computed by scipy."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robustflat.apps.config import config_folder
from robustflat.errors import UserError
from robustflat.reporting.columns import columns
from robustflat.reporting.correlation import correlation, regression_line
from robustflat.reporting.correlation_ledger import PAIRS, ledger_columns
from robustflat.reporting.paper import GOOD, POOR, TABLES, from_paper, printed
from robustflat.reporting.quantities import group_of
from robustflat.store.tables import COLUMNS, tidy

CROSS_CHECKS = [
    ("average-case flatness", "RLoss", 0.847, 0.856),
    ("worst-case flatness", "RLoss", 0.499, 0.650),
    ("average-case flatness of CE", "RLoss", 0.278, 0.513),
    ("worst-case flatness of CE", "RLoss", 0.549, 0.591),
    ("average-case flatness", "RErr (AA)", 0.646, 0.639),
    ("average-case flatness", "RErr (PGD)", 0.712, 0.722),
    ("average-case flatness", "RLoss gap", 0.841, 0.863),
    ("average-case flatness", "RLoss after best", 0.817, 0.848),
    ("RLoss", "RErr (AA)", 0.720, 0.776),
]

EDGES = (100 * GOOD, 100 * POOR)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return ledger_columns(from_paper())


def test_rows_typed_from_the_tables() -> None:
    rows = printed().set_index("model")
    assert len(rows) == 74 and rows.index.is_unique
    errors = ["err_test", "rerr_test_pgd", "rerr_test_aa", "err_train", "rerr_train_pgd", "rerr_train_aa",
              "rerr_stop_pgd", "rerr_stop_aa", "avg_ce", "worst_ce", "avg_rloss", "worst_rloss"]  # fmt: skip
    losses = ["ce_test", "rloss_test_pgd", "rloss_test_aa", "ce_train", "rloss_train_pgd", "rloss_train_aa",
              "rloss_stop_pgd", "rloss_stop_aa"]  # fmt: skip
    assert rows.loc["AT (baseline)", errors].tolist() == [
        20.2,
        61,
        62.8,
        0.33,
        8.5,
        10.7,
        52.3,
        54.6,
        0.21,
        21.05,
        1.22,
        6.49,
    ]
    assert rows.loc["AT (baseline)", losses].tolist() == [0.75, 3.91, 0.99, 0.02, 0.19, 0.08, 1.53, 0.77]
    assert rows.loc["TRADES λ=9", errors].tolist() == [
        23.03,
        52.4,
        55,
        2.92,
        16.4,
        18.8,
        49.7,
        53,
        0.19,
        5.04,
        0.45,
        3.08,
    ]
    assert rows.loc["GeLU", losses].tolist() == [0.82, 4.27, 1.06, 0, 0.06, 0.02, 1.7, 0.79]
    assert rows.loc['"Late" multi-step', "rloss_test_pgd"] == 2.63
    assert rows["rerr_test_aa"].is_monotonic_increasing


def test_every_row_has_its_experiment_file_and_the_file_names_the_row() -> None:
    rows = printed()
    files = {path.stem: path.read_text() for path in (config_folder() / "experiment" / "iccv21").glob("*.yaml")}
    assert sorted(rows["experiment"]) == sorted(files)
    for row in rows.to_dict("records"):
        head = re.sub(r'"', "", files[row["experiment"]])
        assert f"table of all models, row {row['model']}".replace('"', "") in head
        said = re.search(
            r"RErr ([\d.]+) % by AutoAttack \(([\d.]+) % early.*RLoss ([\d.]+), flatness ([\d.]+) av.*, ([\d.]+) worst",
            head,
        )
        assert said is not None
        numbers = [row[name] for name in ("rerr_test_aa", "rerr_stop_aa", "rloss_test_pgd", "avg_rloss", "worst_rloss")]
        assert [float(number) for number in said.groups()] == numbers


def test_table1_belongs_to_rows_and_its_groups_to_table1() -> None:
    table, groups, rows = printed("table1"), printed("groups").set_index("group"), printed().set_index("experiment")
    assert len(table) == 19
    assert np.allclose(table["rerr_test_aa"], rows.loc[table["experiment"], "rerr_test_aa"])
    assert (table["rerr_train_aa"] - table["rerr_test_aa"] - table["rerr_train_minus_test"]).abs().max() < 0.051
    assert [group_of(error, EDGES) for error in table["rerr_test_aa"]] == table["group"].tolist()
    means = table.groupby("group")[["rerr_test_aa", "rerr_train_aa", "avg_rloss"]].mean()
    difference = (means - groups.loc[means.index, means.columns]).abs().max()
    assert (difference <= [0.1, 0.1, 0.01]).all()


@pytest.mark.parametrize(
    ("table", "rows", "name", "column", "value"),
    [
        ("figure", 12, "MART", "rerr_test_aa", 61),
        ("scale", 3, "Scaled ×2", "avg_rloss", 1.27),
        ("hessian", 11, "AT-AWP", "convexity", 0.241),
        ("hessian", 11, "Scaled ×0.5", "lambda_max", 7936),
        ("robustbench", 8, "Wang [128]", "rloss_test_pgd", 1.11),
        ("robustbench", 8, "Carmon et al. [16]", "rerr_train_aa", 19.2),
    ],
)
def test_smaller_tables(table: str, rows: int, name: str, column: str, value: float) -> None:
    found = printed(table)
    assert len(found) == rows and found.set_index("model").loc[name, column] == value


def test_unknown_table() -> None:
    assert len(TABLES) == 7
    with pytest.raises(UserError, match="models"):
        printed("everything")


@pytest.mark.parametrize(("x", "y", "pearson", "spearman"), CROSS_CHECKS)
def test_correlations_of_the_tables(frame: pd.DataFrame, x: str, y: str, pearson: float, spearman: float) -> None:
    assert (x, y) in PAIRS
    for method, expected, oracle in (("pearson", pearson, stats.pearsonr), ("spearman", spearman, stats.spearmanr)):
        found = correlation(frame[x], frame[y], method=method)
        assert round(found.value, 3) == expected
        assert found.value == pytest.approx(oracle(frame[x], frame[y])[0], abs=1e-12)
        assert found.p == pytest.approx(oracle(frame[x], frame[y])[1], rel=1e-8)


def test_the_sentence_and_the_line_of_the_paper(frame: pd.DataFrame) -> None:
    names = ("average-case flatness", "robust loss")
    text = str(correlation(frame["average-case flatness"], frame["RLoss"], names=names))
    assert text.startswith("Over 74 models, robust loss rises with average-case flatness: Pearson 0.85 [0.7")
    assert text.endswith("(95 % BCa bootstrap over models), p = 2e-21.")
    line = regression_line(frame["average-case flatness"], frame["RLoss"], names=names)
    assert (round(line.intercept, 3), round(line.slope, 3)) == (1.298, 1.442)


def test_records_are_like_those_of_our_runs() -> None:
    records = from_paper()
    assert len({record.run_id for record in records}) == 74
    for record in records[:3]:
        assert list(record.table.columns) == list(COLUMNS)
        assert (record.table.dtypes == tidy([]).dtypes).all()
        assert set(record.table["run_id"]) == {record.run_id} and re.fullmatch("[0-9a-f]{8}", record.run_id)
    first = columns(records, aa="autoattack robust_error", gap="robust_loss (gap)", early="robust_loss @early_stopped",
                    train="clean error (train)").iloc[0]  # fmt: skip
    assert first[["aa", "gap", "early", "train"]].tolist() == pytest.approx([0.489, 0.24, 1.18, 0.126])
    assert first["aa_stderr"] == pytest.approx((0.489 * 0.511 / 1000) ** 0.5)
    assert [group_of(error, EDGES) for error in (56, 57, 60, math.nan)] == ["good", "average", "poor", ""]


def test_data_ships_with_the_package() -> None:
    folder = Path(__file__).parents[3] / "robustflat" / "reporting" / "data"
    assert {path.name for path in folder.iterdir()} >= {"iccv21.csv", *(f"iccv21_{t}.csv" for t in TABLES[1:])}
