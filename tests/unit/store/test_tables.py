"""Tidy tables: columns, merging, files, and text for papers."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from robustflat.errors import DataError, UserError
from robustflat.store.tables import COLUMNS, as_text, combined, read_table, tidy, wide, write_table


def row(**changes):
    base = {"run_id": "ab12", "experiment": "at", "seed": 0, "checkpoint": "last", "split": "test", "kind": "attack"}
    return {**base, "measure": "pgd20", "metric": "robust_error", "value": 0.5, "count": 10, "key": "k", **changes}


def test_a_table_has_all_columns_with_their_types_even_when_empty():
    for rows in ([], [row()], [row(epoch=5, radius=0.5)]):
        table = tidy(rows)
        assert list(table.columns) == list(COLUMNS)
        assert {name: str(kind) for name, kind in table.dtypes.items()} == {
            name: str(pd.Series([], dtype=kind).dtype) for name, kind in COLUMNS.items()
        }


def test_absent_values_are_missing_not_zero():
    table = tidy([row()])
    assert table["epoch"].isna().all()
    assert math.isnan(table["radius"][0])


def test_an_unknown_key_is_named():
    with pytest.raises(UserError, match="Not columns of the table: colour"):
        tidy([row(colour="red")])


def test_new_rows_replace_old_rows_about_the_same_number():
    old = tidy([row(value=0.1), row(value=0.2, run_id="cd34")])
    table = combined(old, tidy([row(value=0.9)]))
    assert sorted(zip(table["run_id"], table["value"], strict=True)) == [("ab12", 0.9), ("cd34", 0.2)]
    assert len(combined(tidy([]), old)) == 2
    assert len(combined(old, tidy([]))) == 2


def test_parquet_comes_back_as_written(tmp_path):
    table = tidy([row(), row(metric="robust_loss", value=float("nan"), epoch=3)])
    write_table(table, tmp_path / "new" / "metrics.parquet")
    pd.testing.assert_frame_equal(read_table(tmp_path / "new" / "metrics.parquet"), table)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["metrics.parquet"]


def test_a_damaged_missing_or_foreign_table_is_named(tmp_path):
    with pytest.raises(DataError, match="no table"):
        read_table(tmp_path / "metrics.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet is damaged"):
        read_table(tmp_path / "a.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has the columns x"):
        read_table(tmp_path / "b.parquet")


def test_csv_keeps_full_precision(tmp_path):
    write_table(tidy([row(value=1 / 3)]), tmp_path / "t.csv")
    assert pd.read_csv(tmp_path / "t.csv")["value"][0] == 1 / 3


def test_markdown_and_latex_escape_their_signs():
    table = pd.DataFrame({"a|b_c": ["x|y & 5%"], "value": [0.123456]})
    assert as_text(table, "md").splitlines() == ["| a\\|b_c | value |", "| --- | --- |", "| x\\|y & 5% | 0.1235 |"]
    latex = as_text(table, "tex")
    assert r"a|b\_c & value \\" in latex
    assert r"x|y \& 5\% & 0.1235 \\" in latex
    assert latex.startswith(r"\begin{tabular}{ll}")


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match="ending"):
        write_table(tidy([]), tmp_path / "t.xlsx")


def test_wide_has_a_line_for_each_network_and_a_column_for_each_number():
    rows = [row(), row(metric="error", measure="clean", value=0.1), row(run_id="cd34", value=0.7)]
    table = wide(tidy(rows))
    assert list(table.columns) == [
        "experiment", "run_id", "checkpoint", "pgd20 robust_error (test)", "error (test)",
    ]  # fmt: skip
    assert table.set_index("run_id").loc["ab12", "error (test)"] == 0.1
    assert math.isnan(table.set_index("run_id").loc["cd34", "error (test)"])
    assert wide(tidy([])).empty


def test_wide_takes_only_columns():
    with pytest.raises(UserError, match="column"):
        wide(tidy([row()]), rows=("colour",))
