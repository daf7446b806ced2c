"""Cells of tables: what they show and what they are sorted by."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from robustflat.reporting.numbers import number, with_error
from robustflat.reporting.report_tables import Cell, table_of


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"), (9999.4, "9999"), (9999.6, "10000"), (-9999.6, "-10000"), (123456.7, "123457"),
        (0.0, "0"), (1e-5, "1.000e-05"), (1.5e7, "1.500e+07"), (math.nan, "–"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_numbers_have_no_exponent_where_that_is_short(value: float, text: str) -> None:
    assert number(value) == text
    assert number(99.7, 2) == "100"


def test_values_are_rounded_to_two_digits_of_their_error() -> None:
    assert with_error(1.23456, 0.0234) == "1.235 ± 0.023" and with_error(123.4, 45.6) == "123 ± 46"
    assert with_error(1.23456, math.nan) == with_error(1.23456, 0.0) == "1.235"


def test_cells_of_every_kind() -> None:
    frame = pd.DataFrame({"text": ["a", None], "whole": pd.Series([1, None], dtype="Int64"), "share": [0.5, math.inf],
                          "yes": [True, False]})  # fmt: skip
    table = table_of(frame, "key", "title")
    assert table.numeric == (False, True, True, False)
    assert table.rows[0] == (Cell("a"), Cell("1", 1), Cell("0.5", 0.5), Cell("True"))
    assert table.rows[1] == (Cell("–"), Cell("–", ""), Cell("inf", ""), Cell("False"))
