"""Rows of curvature and sharpness against values written down by hand."""

from __future__ import annotations

import math

from robustflat.evaluation.curvature_rows import sharpness_rows, spectrum_rows


def test_ends_ratio_and_estimates_of_a_spectrum() -> None:
    attrs = {"examples": 8, "trace": 3.0, "trace_standard_error": 0.1, "frobenius": 5.0}
    rows = spectrum_rows("clean", [4.0, 2.0], [-1.0, -0.5], attrs, residuals=(0.01, 0.02))
    found = {row["metric"]: (row["value"], row["stderr"]) for row in rows}
    assert found["lambda_max"] == (4.0, 0.01)
    assert found["lambda_min"] == (-1.0, 0.02)
    assert found["non_convexity"][0] == 0.25
    assert found["trace"] == (3.0, 0.1)
    assert found["frobenius"][0] == 5.0 and math.isnan(found["frobenius"][1])
    assert {(row["kind"], row["measure"], row["count"]) for row in rows} == {("hessian", "clean", 8)}


def test_what_was_not_measured_has_no_row() -> None:
    assert spectrum_rows("clean", [], [], {"examples": 8}, residuals=(math.nan, math.nan)) == []
    assert [row["metric"] for row in spectrum_rows("clean", [0.0], [-1.0], {"examples": 8}, residuals=(0, 0))] == [
        "lambda_max",
        "lambda_min",
    ]


def test_sharpness_has_its_two_errors_where_they_are_known() -> None:
    both = sharpness_rows("sam", {"examples": 8, "value": 2.0, "standard_error": 0.5, "example_error": 0.25})
    assert [(row["metric"], row["value"], row["stderr"]) for row in both] == [
        ("sharpness", 2.0, 0.5),
        ("sharpness_over_examples", 2.0, 0.25),
    ]
    (only,) = sharpness_rows("sam", {"examples": 8, "value": 2.0})
    assert math.isnan(only["stderr"])


def test_other_matrices_and_losses_are_other_measures() -> None:
    for setting, value, name in (
        ("curvature", "hessian", "clean"),
        ("curvature", "gauss_newton", "clean_gauss_newton"),
        ("reduction", "mean", "clean"),
        ("reduction", "sum_over_batches", "clean_sum_over_batches"),
    ):
        (row,) = spectrum_rows("clean", [4.0], [], {"examples": 8, setting: value}, residuals=(0.0, math.nan))
        assert row["measure"] == name
    for loss, name in (("clean loss", "sam"), ("frozen loss, attack Pgd(...)", "sam_frozen")):
        (row,) = sharpness_rows("sam", {"examples": 8, "value": 2.0, "loss": loss})
        assert row["measure"] == name
