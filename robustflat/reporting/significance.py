"""p-values of correlation coefficients, and their correction for many comparisons."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from robustflat.errors import UserError, require_one_of
from robustflat.reporting.kernels import Array, Kernel

_EXACT = 100
"""Models up to which the null distribution of Kendall's tau is counted out."""

CORRECTIONS = ("holm", "benjamini-hochberg")


def p_of_t(value: float, free: int) -> float:
    """Two-sided p of Pearson's r, or approximately Spearman's rho, by Student's t with `free` degrees of freedom."""
    if math.isnan(value) or free < 1:
        return math.nan
    if abs(value) >= 1:
        return 0.0
    return float(2 * special.stdtr(free, -abs(value) * math.sqrt(free / (1 - value * value))))


def p_of_kendall(x: Array, y: Array) -> float:
    """Two-sided p of Kendall's tau: exact without ties up to 100 models, else normal with the variance under ties."""
    n = len(x)
    score = float(np.triu(np.sign(x[:, None] - x) * np.sign(y[:, None] - y), 1).sum())
    ties_x, ties_y = (np.unique(values, return_counts=True)[1].astype(np.float64) for values in (x, y))
    if n <= _EXACT and len(ties_x) == n == len(ties_y):
        chances = _inversions(n)
        discordant = round((n * (n - 1) / 2 - score) / 2)
        end = min(discordant, len(chances) - 1 - discordant)
        return min(1.0, 2 * float(chances[: end + 1].sum()))
    spread = _variance(n, ties_x, ties_y)
    return float(2 * special.ndtr(-abs(score) / math.sqrt(spread))) if spread > 0 else math.nan


def _inversions(n: int) -> Array:
    """Probability of each number of discordant pairs among n models in random order, (n (n - 1) / 2 + 1,)."""
    chances = np.ones(1)
    for size in range(2, n + 1):
        chances = np.convolve(chances, np.full(size, 1 / size))
    return chances


def _variance(n: int, tx: Array, ty: Array) -> float:
    """Variance of concordant minus discordant pairs under independence, ties kept (Kendall 1970)."""

    def third(t: Array) -> float:
        return float((t * (t - 1) * (2 * t + 5)).sum())

    def second(t: Array) -> float:
        return float((t * (t - 1)).sum())

    def triple(t: Array) -> float:
        return float((t * (t - 1) * (t - 2)).sum())

    pairs = n * (n - 1)
    total = (pairs * (2 * n + 5) - third(tx) - third(ty)) / 18 + second(tx) * second(ty) / (2 * pairs)
    return total + (triple(tx) * triple(ty) / (9 * pairs * (n - 2)) if n > 2 else 0.0)


def p_of_clusters(value: float, samples: Array, clusters: int) -> float:
    """Two-sided p from the spread of a bootstrap over clusters, on the scale of arctanh, by Student's t."""
    known = samples[np.abs(samples) < 1]
    if math.isnan(value) or abs(value) >= 1 or clusters < 3 or len(known) < 0.8 * len(samples):
        return math.nan
    spread = float(np.arctanh(known).std(ddof=1))
    if spread <= 0:
        return math.nan
    return float(2 * special.stdtr(clusters - 2, -abs(math.atanh(value)) / spread))


def p_by_permutation(kernel: Kernel, x: Array, y: Array, orders: NDArray[np.intp]) -> float:
    """Share of random orders of y, the given one counted in, with a coefficient at least as far from 0.

    Args:
        kernel: the coefficient.
        x, y: (n,).
        orders: (B, n) permutations of 0..n-1.
    """
    ones = np.ones(orders.shape)
    value = abs(float(kernel(x, y, ones[:1])[0]))
    if math.isnan(value):
        return math.nan
    shuffled = np.abs(kernel(x, y[orders], ones))
    known = shuffled[~np.isnan(shuffled)]
    return float((1 + (known >= value - 1e-12).sum()) / (1 + len(known)))


def adjusted(p: ArrayLike, correction: str = "holm") -> Array:
    """p-values corrected for how many there are.

    Args:
        p: (m,) p-values in [0, 1]; NaN stays NaN and does not count.
        correction: "holm" bounds the chance of any false finding (Holm 1979); "benjamini-hochberg" the expected share
            of false ones among the findings (1995; for measures that are independent or positively related).

    Raises:
        UserError: for another correction, or values outside [0, 1].
    """
    require_one_of("correction", correction, CORRECTIONS)
    values = np.asarray(p, dtype=np.float64)
    known = values[~np.isnan(values)]
    if values.ndim != 1 or ((known < 0) | (known > 1)).any():
        raise UserError(f"p-values must be a list of numbers in [0, 1], got {values.tolist()}.")
    order, m = np.argsort(known, kind="stable"), len(known)
    ranked = known[order]
    if correction == "holm":
        made = np.maximum.accumulate(ranked * np.arange(m, 0, -1))
    else:
        made = np.minimum.accumulate((ranked * m / np.arange(1, m + 1))[::-1])[::-1]
    result, back = np.full(values.shape, np.nan), np.empty(m)
    back[order] = np.minimum(made, 1.0)
    result[~np.isnan(values)] = back
    return result
