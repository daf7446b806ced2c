"""Coefficients, p-values and intervals against scipy and brute force; what happens with too little."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from robustflat.errors import UserError
from robustflat.reporting.bootstrap import Units, bias_corrected_normal, bootstrap_interval, counts
from robustflat.reporting.correlation import (
    Correlation,
    Resampling,
    adjusted,
    correlation,
    correlation_over_examples,
    correlation_table,
    regression_line,
)
from robustflat.reporting.kernels import Array, granulated, kendall, midranks, partial, pearson, spearman
from robustflat.reporting.significance import p_of_clusters

ORACLES = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
KERNELS = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


def sample(n: int, seed: int = 0, *, ties: bool = False) -> tuple[Array, Array]:
    draws = np.random.default_rng(seed)
    x = draws.normal(size=n)
    y = 0.6 * x + draws.normal(size=n)
    return (np.round(x), np.round(y)) if ties else (x, y)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [5, 12, 31, 120])
def test_value_and_p_are_those_of_scipy(method: str, ties: bool, n: int) -> None:
    x, y = sample(n, n, ties=ties)
    found = correlation(x, y, method=method)
    exact = {"method": "exact" if not ties and n <= 100 else "asymptotic"} if method == "kendall" else {}
    value, p = ORACLES[method](x, y, **exact)
    assert (found.value, found.p) == pytest.approx((value, p), rel=1e-9)
    assert found.n == n


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("varying", [False, True])
def test_weighted_kernels_are_those_of_repeated_values(method: str, varying: bool) -> None:
    x, y = sample(9, 3)
    weights = counts(9, 20, torch.Generator().manual_seed(1))
    X, Y = (
        np.tile(values, (20, 1)) + (np.arange(20)[:, None] if varying else 0) * 0.1 * values[::-1] for values in (x, y)
    )
    found = KERNELS[method](X, Y, weights) if varying else KERNELS[method](x, y, weights)
    for row, weight in enumerate(weights.astype(int)):
        repeated = [np.repeat((X if s == "x" else Y)[row], weight) for s in "xy"]
        assert found[row] == pytest.approx(ORACLES[method](*repeated)[0], abs=1e-12)


def test_midranks_are_those_of_scipy() -> None:
    values, weights = np.array([3.0, 1.0, 3.0, 2.0, 1.0]), np.array([[1, 2, 1, 0, 3]])
    ranks = stats.rankdata(np.repeat(values, weights[0]))
    assert np.repeat(midranks(values, weights.astype(float))[0], weights[0]).tolist() == ranks.tolist()


def test_drawn_units_stay_together() -> None:
    units = Units(np.array([0, 0, 1, 2, 2, 2]), 3)
    weights = units.weights(Resampling(), torch.Generator().manual_seed(0))
    assert weights.shape == (2000, 6)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert units.without_one().tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]]


def test_bca_is_that_of_scipy() -> None:
    x, y = sample(40, 2)

    def of_rows(a: Array, b: Array, axis: int = -1) -> Array:
        return (
            stats.spearmanr(a, b)[0]
            if a.ndim == 1
            else np.array([stats.spearmanr(*p)[0] for p in zip(a, b, strict=True)])
        )

    oracle = stats.bootstrap((x, y), of_rows, paired=True, n_resamples=2000, method="BCa", rng=np.random.default_rng(0))
    found = correlation(x, y, method="spearman", settings=Resampling(resamples=4000))
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval), abs=0.05)


def test_bca_from_the_same_samples_is_that_of_scipy() -> None:
    data = np.exp(np.random.default_rng(5).normal(size=15))  # skewed: bias and acceleration both count
    oracle = stats.bootstrap((data,), np.mean, method="BCa", n_resamples=2000, rng=np.random.default_rng(0))
    jackknife = np.array([np.delete(data, i).mean() for i in range(15)])
    settings = Resampling()
    found = bootstrap_interval(oracle.bootstrap_distribution, data.mean(), units=15, settings=settings,
                               jackknife=jackknife, stretched=False)  # fmt: skip
    assert tuple(found) == pytest.approx(tuple(oracle.confidence_interval), rel=1e-9)
    plain = bootstrap_interval(oracle.bootstrap_distribution, data.mean(), units=15, settings=settings, stretched=False)
    assert tuple(plain) == pytest.approx(tuple(np.quantile(oracle.bootstrap_distribution, [0.025, 0.975])))


def test_normal_interval_and_p_from_a_spread_by_hand() -> None:
    z = np.random.default_rng(0).normal(size=4001)
    scaled = 0.8 + 0.3 * (z - z.mean()) / z.std(ddof=1)
    samples = np.append(np.tanh(scaled), np.nan)
    # The bootstrap lies 0.1 below arctanh of the estimate, so the truth is taken to lie 0.1 above it.
    found = bias_corrected_normal(samples, math.tanh(0.9), 0.9)
    reach = float(stats.norm.ppf(0.95)) * 0.3
    assert tuple(np.arctanh(found)) == pytest.approx((1.0 - reach, 1.0 + reach))
    assert p_of_clusters(math.tanh(0.9), samples, 7) == pytest.approx(2 * stats.t.sf(0.9 / 0.3, 5))


def test_analytic_interval_is_that_of_scipy() -> None:
    x, y = sample(20)
    found = correlation(x, y, settings=Resampling(interval="analytic", confidence=0.9))
    assert (found.low, found.high) == pytest.approx(tuple(stats.pearsonr(x, y).confidence_interval(0.9)))
    assert "90 % analytic interval over models" in str(found)


def test_invariant_under_scale_shift_and_order() -> None:
    x, y = sample(15)
    found, moved = correlation(x, y), correlation(1e6 + 3 * x, -2 * y)
    assert moved.value == pytest.approx(-found.value, abs=1e-9)
    assert (moved.low, moved.high) == pytest.approx((-found.high, -found.low), abs=0.02)
    assert "falls with rising" in str(correlation(x, y - 3 * x))
    assert correlation(x, y) == found


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        ([], [], "No model"),
        ([1.0], [2.0], "Only 1 model with"),
        ([1.0, 2.0], [1.0, 2.0], "Only 2 models"),
        ([0.3] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], "All 5 models have the same x"),
        ([1.0, 2.0, 3.0], [0.1 + 0.2, 0.3, 0.3], "All 3 models have the same y"),
        ([math.nan] * 4, [1.0, 2.0, 3.0, 4.0], "No model"),
        ([1.0, math.inf, 2.0, math.nan], [1.0, 2.0, 3.0, 4.0], "Only 2 models"),
        ([1e-300, 2e-300, 3e-300], [5.0, 5.0, 5.0], "the same y"),
    ],
)
@pytest.mark.parametrize("method", ORACLES)
def test_too_little_gives_a_reason(x: list[float], y: list[float], why: str, method: str) -> None:
    found = correlation(x, y, method=method)
    assert not found.defined and math.isnan(found.low) and why in found.why and found.why in str(found)
    assert not regression_line(x, y).defined or "same y" in why


def test_missing_models_are_counted_and_few_are_warned_of() -> None:
    x, y = sample(8)
    x[2] = math.nan
    found = correlation(pd.Series(x), pd.Series([*y[:5], None, *y[6:]], dtype="Float64"))
    assert found.n == 6
    assert "2 of 8 models left out" in str(found) and "Fewer than 10 models" in str(found)


def test_perfect_relations_have_no_interval() -> None:
    found = correlation([1, 2, 3, 4, 5], [1, 4, 9, 16, 25], method="spearman")
    assert found.value == 1 and math.isnan(found.low) and "tends to rise" in str(found)
    tiny = correlation([1, 2, 3], [1, 2, 4])
    assert tiny.defined and "interval" in str(tiny)


@pytest.mark.parametrize("n", [3, 4, 5, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_p_of_wholly_agreeing_ranks_is_that_of_all_orders(n: int, sign: int) -> None:
    x = np.arange(n)
    found = correlation(x, sign * x**3, method="spearman")
    orders = list(itertools.permutations(range(n))) if n <= 5 else []
    extreme = sum(list(order) in (list(range(n)), list(range(n))[::-1]) for order in orders)
    assert found.p == pytest.approx(extreme / len(orders) if orders else 2 / math.factorial(n))
    tied = correlation([1, 1, 2, 3, 4], [5, 5, 6, 7, 8], method="spearman")
    assert tied.value == 1 and 0.001 < tied.p < 0.1


def test_clusters_are_what_counts() -> None:
    x, y = sample(12)
    groups = np.repeat(np.arange(12), 5)
    found = correlation(np.repeat(x, 5), np.repeat(y, 5), clusters=groups)
    single, naive = correlation(x, y), correlation(np.repeat(x, 5), np.repeat(y, 5))
    assert found.value == pytest.approx(single.value)
    assert (found.low, found.high) == pytest.approx((single.low, single.high), abs=1e-9)
    assert naive.high - naive.low < 0.6 * (found.high - found.low) and naive.p < found.p
    assert "Over 60 models of 12 configurations" in str(found)
    assert "Only 2 configurations" in correlation([1, 2, 3, 5], [1, 3, 2, 4], clusters=["a", "a", "b", "b"]).why


def test_wrong_requests() -> None:
    with pytest.raises(UserError, match="3 values, y has 2"):
        correlation([1, 2, 3], [1, 2])
    with pytest.raises(UserError, match="pearson"):
        correlation([1, 2, 3], [1, 2, 3], method="pearsn")
    with pytest.raises(UserError, match="analytic"):
        correlation([1, 2, 3, 4], [1, 2, 3, 4], clusters=[1, 1, 2, 3], settings=Resampling(interval="analytic"))
    with pytest.raises(UserError, match="confidence"):
        Resampling(confidence=95)
    with pytest.raises(UserError, match="numbers"):
        correlation(["a", "b", "c"], [1, 2, 3])


@pytest.mark.parametrize(("correction", "name"), [("benjamini-hochberg", "bh")])
def test_false_discovery_rate_is_that_of_scipy(correction: str, name: str) -> None:
    p = np.random.default_rng(0).uniform(size=20) ** 3
    assert adjusted(p, correction) == pytest.approx(stats.false_discovery_control(p, method=name))


def test_holm_by_hand() -> None:
    assert adjusted([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(adjusted([math.nan, 0.5])[0]) and adjusted([math.nan, 0.5])[1] == 0.5
    assert adjusted([]).size == 0
    with pytest.raises(UserError):
        adjusted([1.5])


def test_table_of_many_measures() -> None:
    x, y = sample(20)
    frame = pd.DataFrame({"loss": y, "good": x, "bad": np.random.default_rng(9).normal(size=20), "empty": math.nan})
    table = correlation_table(frame, "loss", ["good", "bad", "empty"], methods=("pearson",))
    p = [stats.pearsonr(frame[name], y)[1] for name in ("good", "bad")]
    assert table["p_holm"].tolist()[:2] == pytest.approx(
        [min(1, 2 * min(p)) if v == min(p) else max(v, 2 * min(p)) for v in p]
    )
    assert "No model" in table["note"].iloc[2]
    with pytest.raises(UserError, match="good"):
        correlation_table(frame, "loss", ["goood"])


def test_granulated_kendall_by_brute_force() -> None:
    draws = np.random.default_rng(0)
    grid = list(itertools.product(range(3), range(4)))
    x, y = draws.normal(size=12), draws.normal(size=12)
    axes = []
    for axis in (0, 1):
        taus = []
        for other in sorted({point[1 - axis] for point in grid}):
            chosen = [i for i, point in enumerate(grid) if point[1 - axis] == other]
            taus.append(stats.kendalltau(x[chosen], y[chosen])[0])
        axes.append(np.mean(taus))
    sets = [
        [np.array([i for i, p in enumerate(grid) if p[1 - a] == o]) for o in range(4 if a == 0 else 3)] for a in (0, 1)
    ]
    assert granulated(sets)(x, y, np.ones((1, 12)))[0] == pytest.approx(np.mean(axes))


def test_partial_kernel_under_weights_is_that_of_residuals() -> None:
    draws = np.random.default_rng(0)
    x, y, c, d = draws.normal(size=(4, 12))
    weights = counts(12, 10, torch.Generator().manual_seed(0))
    found = partial(np.array([c, d]), ranks=False)(x, y, weights)
    for row, weight in enumerate(weights.astype(int)):
        a, b, *held = (np.repeat(values, weight) for values in (x, y, c, d))
        design = np.column_stack([np.ones(len(a)), *held])
        left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (a, b)]
        assert found[row] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-9)


def test_examples_are_drawn_jointly() -> None:
    draws = np.random.default_rng(0)
    x, y = sample(20, 4)
    shared = 5 * draws.normal(size=300)
    # What all models share about an example moves all means alike, and so no correlation.
    found = correlation_over_examples(x[:, None] + shared, y[:, None] + shared, over="examples")
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.high - found.low < 1e-9
    noisy = x[:, None] + draws.normal(size=(20, 300)) * 3, y[:, None] + draws.normal(size=(20, 300)) * 3
    widths = {over: correlation_over_examples(*noisy, over=over) for over in ("examples", "models", "both")}
    examples, models, both = (found.high - found.low for found in widths.values())
    assert examples < models < 1.3 * both and both > 1.5 * examples
    assert "models and evaluation examples" in str(widths["both"])
    with pytest.raises(UserError, match="models, examples"):
        correlation_over_examples(x, y)
    assert "No model" in correlation_over_examples(np.empty((4, 0)), np.empty((4, 0))).why


def test_result_says_what_it_is_not() -> None:
    assert "not defined" in str(Correlation("Pearson", "a", "b", why="No model has both values."))
