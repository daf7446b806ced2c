"""How often 95 % intervals hold the true coefficient of simulated data. Slow: thousands of bootstraps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from robustflat.reporting.correlation import (
    Correlation,
    Resampling,
    corrected_for_noise,
    correlation,
    correlation_over_examples,
    partial_correlation,
    within_family,
)

REPEATS = 500
TRUTH: dict[str, Callable[[float], float]] = {
    "pearson": lambda rho: rho,
    "spearman": lambda rho: 6 / np.pi * np.arcsin(rho / 2),
    "kendall": lambda rho: 2 / np.pi * np.arcsin(rho),
}
pytestmark = pytest.mark.slow
Pair = tuple[np.ndarray, np.ndarray]


def normal(draws: np.random.Generator, n: int, rho: float) -> Pair:
    x = draws.normal(size=n)
    return x, rho * x + np.sqrt(1 - rho**2) * draws.normal(size=n)


def coverage(make: Callable[[np.random.Generator], Correlation], truth: float) -> float:
    draws = np.random.default_rng(7)
    found = [make(draws) for _ in range(REPEATS)]
    return 100 * float(np.mean([result.low <= truth <= result.high for result in found]))


def settings(interval: str = "auto") -> Resampling:
    return Resampling(interval=interval, resamples=600)


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("n", [12, 74])
@pytest.mark.parametrize("interval", ["analytic", "percentile", "bca"])
@pytest.mark.parametrize("method", TRUTH)
def test_models(method: str, interval: str, n: int, rho: float) -> None:
    def make(draws: np.random.Generator) -> Correlation:
        return correlation(*normal(draws, n, rho), method=method, settings=settings(interval))

    assert 92 <= coverage(make, TRUTH[method](rho)) <= 98


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("method", TRUTH)
def test_clusters(method: str, rho: float) -> None:
    def make(draws: np.random.Generator) -> Correlation:
        common, own = normal(draws, 15, rho), normal(draws, 45, rho)
        x, y = (np.repeat(c, 3) * 0.8**0.5 + o * 0.2**0.5 for c, o in zip(common, own, strict=True))
        return correlation(x, y, method=method, clusters=np.repeat(np.arange(15), 3), settings=settings())

    assert 92 <= coverage(make, TRUTH[method](rho)) <= 98


def test_seeds_taken_as_models_would_not_cover() -> None:
    def make(draws: np.random.Generator) -> Correlation:
        x, y = (np.repeat(values, 3) for values in normal(draws, 15, 0.5))
        return correlation(x, y, settings=settings())

    assert coverage(make, 0.5) < 85


@pytest.mark.parametrize("method", TRUTH)
def test_models_and_examples(method: str) -> None:
    def make(draws: np.random.Generator) -> Correlation:
        x, y = normal(draws, 20, 0.8)
        noisy = [values[:, None] + draws.normal(size=(20, 300)) for values in (x, y)]
        return correlation_over_examples(*noisy, method=method, settings=settings())

    assert 92 <= coverage(make, TRUTH[method](0.8)) <= 98


def test_examples_alone() -> None:
    x, y = normal(np.random.default_rng(0), 20, 0.8)

    def make(draws: np.random.Generator) -> Correlation:
        noisy = [values[:, None] + draws.normal(size=(20, 300)) for values in (x, y)]
        return correlation_over_examples(*noisy, over="examples", settings=settings())

    assert 92 <= coverage(make, float(np.corrcoef(x, y)[0, 1])) <= 98


@pytest.mark.parametrize("n", [24, 74])
def test_partial(n: int) -> None:
    def make(draws: np.random.Generator) -> Correlation:
        x, y = normal(draws, n, 0.6)
        c = draws.normal(size=n)
        return partial_correlation(x + c, y - c, {"c": c}, settings=settings())

    assert 92 <= coverage(make, 0.6) <= 98


def test_within_families() -> None:
    def make(draws: np.random.Generator) -> Correlation:
        family = np.repeat(np.arange(10), 4)
        x, y = normal(draws, 40, 0.6)
        return within_family(x + draws.normal(size=10)[family], y, family, settings=settings())

    assert 92 <= coverage(make, 0.6) <= 98


def test_corrected_for_noise() -> None:
    def make(draws: np.random.Generator) -> Correlation:
        x, y = (values + 0.4 * draws.normal(size=40) for values in normal(draws, 40, 0.7))
        return corrected_for_noise(x, y, np.full(40, 0.4), np.full(40, 0.4), settings=settings())

    assert 92 <= coverage(make, 0.7) <= 98
