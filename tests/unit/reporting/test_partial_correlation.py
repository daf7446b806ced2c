"""Partial correlation, families, regression and noise against closed forms and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from robustflat.errors import UserError
from robustflat.reporting.correlation import (
    Correlation,
    Resampling,
    across_families,
    corrected_for_noise,
    correlation,
    granulated_kendall,
    partial_correlation,
    regression_line,
    within_family,
)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_one_control_is_the_closed_form(method: str) -> None:
    c, x, y = np.random.default_rng(0).normal(size=(3, 30))
    x, y = x + c, y + c
    a, b, d = (correlation(*pair, method=method).value for pair in ((x, y), (x, c), (y, c)))
    found = partial_correlation(x, y, {"train RLoss": c}, method=method)
    assert found.value == pytest.approx((a - b * d) / math.sqrt((1 - b * b) * (1 - d * d)))
    t = found.value * math.sqrt(27 / (1 - found.value**2))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 27))
    assert "given train RLoss" in str(found)


def test_group_and_controls_are_what_regression_leaves() -> None:
    c, d, x, y = np.random.default_rng(1).normal(size=(4, 30))
    group = np.repeat(["a", "b", "c"], 10)
    design = np.column_stack([c, d, *(group == label for label in "abc")]).astype(float)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    found = partial_correlation(x, y, {"c": c, "d": d}, group=group)
    assert found.value == pytest.approx(stats.pearsonr(*left)[0])
    assert found.low < found.value < found.high and "given c, d and the group" in str(found)


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_units_of_the_controls_do_not_matter(unit: float) -> None:
    c, d, x, y = np.random.default_rng(2).normal(size=(4, 30))
    x, y = x + 3 * c, y + 3 * c
    found = partial_correlation(x, y, {"c": c, "d": unit * d})
    expected = partial_correlation(x, y, {"c": c, "d": d})
    assert found.value == pytest.approx(expected.value) and found.low == pytest.approx(expected.low)
    design = np.column_stack([np.ones(30), c, d])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert found.value == pytest.approx(stats.pearsonr(*left)[0])


def test_a_control_that_does_not_vary_holds_nothing_fixed() -> None:
    x, y, c = np.random.default_rng(3).normal(size=(3, 20))
    assert partial_correlation(x, y, {"c": c, "constant": np.full(20, 0.1)}).value == pytest.approx(
        partial_correlation(x, y, {"c": c}).value
    )
    assert within_family(x, y, ["one"] * 20).value == pytest.approx(correlation(x, y).value)


def test_nothing_left_by_the_controls() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    assert "does not vary once the controls are held fixed" in partial_correlation(x, y, {"c": 2 * x + 1}).why
    assert "too few" in partial_correlation(x[:4], y[:4], {"a": y[4:8], "b": x[4:8]}).why
    with pytest.raises(UserError, match="hold fixed"):
        partial_correlation(x, y)
    with pytest.raises(UserError, match="labels"):
        partial_correlation(x, y, group=["a"])


def test_opposite_inside_and_across_families() -> None:
    draws = np.random.default_rng(0)
    family = np.repeat(np.arange(12), 4)
    x, noise = draws.normal(size=48), 0.1 * draws.normal(size=48)
    x, y = 5 * family + x, 5 * family - x + noise
    inside, across = within_family(x, y, family), across_families(x, y, family)
    assert inside.high < -0.9 and across.low > 0.9
    means = [[v[family == f].mean() for f in range(12)] for v in (x, y)]
    assert across.value == pytest.approx(stats.pearsonr(*means)[0])
    assert "Over 48 models of 12 families" in str(across)
    alone = within_family([*x, 0.0], [*y, 1.0], [*family, 99])
    assert alone.value == pytest.approx(inside.value) and "1 of 49 models" in str(alone)


@pytest.mark.parametrize("of", [within_family, across_families])
def test_models_left_out_for_a_missing_value_are_told(of: Callable[..., Correlation]) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 24))
    x[3] = math.nan
    found = of(x, y, np.repeat(np.arange(8), 3))
    assert found.n == 23 and str(found).count("1 of 24 models left out") == 1


@pytest.mark.parametrize("count", [11, 13])
def test_clusters_need_a_label_for_each_model(count: int) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    with pytest.raises(UserError, match=f"12 values, clusters has {count}"):
        within_family(x, y, np.repeat(np.arange(4), 3), clusters=np.arange(count))


def test_families_that_say_nothing() -> None:
    assert "two models" in within_family([1, 2, 3, 4], [1, 2, 4, 3], ["a", "b", "c", "d"]).why
    assert "No model" in within_family([], [], []).why
    assert "Only 2 families" in across_families([1, 2, 3, 4], [1, 2, 4, 3], ["a", "a", "b", "b"]).why


def test_granulated_kendall_sees_through_a_shared_axis() -> None:
    draws = np.random.default_rng(0)
    a, b = np.repeat(np.arange(6), 6), np.tile(np.arange(6), 6)
    x, y = 10 * a + draws.normal(size=36), 10 * a + draws.normal(size=36)
    whole = correlation(x, y, method="kendall")
    found = granulated_kendall(x, y, {"a": a, "b": b}, settings=Resampling(resamples=300))
    assert whole.value > 0.8 and found.value < 0.75
    assert 0 < found.p < 0.05 and found.low < found.value < found.high
    assert "differ in only one" in granulated_kendall([1, 2, 3], [1, 3, 2], {"a": [1, 2, 3], "b": [1, 2, 3]}).why
    with pytest.raises(UserError, match="axis"):
        granulated_kendall(x, y, {})


def test_line_is_that_of_scipy_and_its_band_holds() -> None:
    draws = np.random.default_rng(0)
    x = draws.normal(size=20)
    y = 1 + 2 * x + draws.normal(size=20)
    line, oracle = regression_line(x, y), stats.linregress(x, y)
    reach = stats.t.ppf(0.975, 18)
    assert (line.slope, line.intercept) == pytest.approx((oracle.slope, oracle.intercept))
    assert line.slope_interval[1] - line.slope == pytest.approx(reach * oracle.stderr)
    assert line.intercept_interval[1] - line.intercept == pytest.approx(reach * oracle.intercept_stderr)
    low, high = line.band(0.0)
    assert (low, high) == pytest.approx(line.intercept_interval)
    wide = line.band([0.0, 5.0], prediction=True)
    assert wide[0][0] < low and wide[1][1] - wide[0][1] > wide[1][0] - wide[0][0]
    assert "y = " in str(line) and "No line" in str(regression_line([1, 1, 1], [1, 2, 3]))
    assert np.isnan(regression_line([], []).band([0.0])[0]).all()


def test_correction_for_noise_by_hand() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    y = x + 0.5 * y
    errors = np.full(40, 0.3), np.full(40, 0.2)
    found = corrected_for_noise(x, y, *errors)
    reliability = [1 - e[0] ** 2 / np.var(v, ddof=1) for v, e in zip((x, y), errors, strict=True)]
    assert found.value == pytest.approx(stats.pearsonr(x, y)[0] / math.sqrt(reliability[0] * reliability[1]))
    assert "independent" in str(found)
    assert "as large as" in corrected_for_noise(x, y, np.full(40, 9.0), errors[1]).why
    with pytest.raises(UserError, match="negative"):
        corrected_for_noise(x, y, -errors[0], errors[1])
