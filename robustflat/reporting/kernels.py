"""Correlation coefficients of many weighted samples at once: what bootstrap, jackknife and permutations need.

A sample of a bootstrap is the original one with a weight (how often it was drawn) for each model, so that thousands of
them are a matrix of weights. All functions take X and Y, (n,) or (B, n) if the values themselves differ from sample to
sample, and weights W (B, n), not negative. They return (B,) coefficients in [-1, 1], NaN where one side does not vary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Kernel = Callable[[Array, Array, Array], Array]

_RELATIVE = 1e-12
"""Spread, relative to the size of the values, below which they count as identical: rounding looks like that."""
_BLOCK = 4_000_000
"""Numbers held at once where a sample needs a matrix of all pairs."""


def pearson(X: Array, Y: Array, W: Array) -> Array:
    """Pearson's r."""
    x, y, weights = _centred(X, W), _centred(Y, W), W
    xx, yy, xy = ((weights * a * b).sum(axis=1) for a, b in ((x, x), (y, y), (x, y)))
    varies = (xx > _floor(X, W)) & (yy > _floor(Y, W))
    return _ratio(xy, xx * yy, varies)


def spearman(X: Array, Y: Array, W: Array) -> Array:
    """Spearman's rho: Pearson's r of the ranks within each sample, ties by their mean rank."""
    return pearson(midranks(X, W), midranks(Y, W), W)


def kendall(X: Array, Y: Array, W: Array) -> Array:
    """Kendall's tau-b: concordant minus discordant pairs, over the pairs that are tied in neither."""
    if X.ndim == 1 and Y.ndim == 1:
        sx, sy = _signs(X), _signs(Y)
        agreement, px, py = (((W @ m) * W).sum(axis=1) for m in (sx * sy, np.abs(sx), np.abs(sy)))
        return _ratio(agreement, px * py, (px > 0) & (py > 0))
    X, Y = (np.broadcast_to(values, W.shape) for values in (X, Y))
    step = max(1, _BLOCK // W.shape[1] ** 2)
    parts = [_kendall_of_rows(X[i : i + step], Y[i : i + step], W[i : i + step]) for i in range(0, len(W), step)]
    return np.concatenate(parts) if parts else np.empty(0)


def granulated(groups: Sequence[Sequence[NDArray[np.intp]]]) -> Kernel:
    """Kernel of the granulated Kendall coefficient.

    Args:
        groups: for each axis, index sets of the models that differ in that axis only. Tau-b is taken within each set,
            averaged over the sets of an axis, then over axes. Sets and axes in which nothing varies do not count.
    """

    def kernel(X: Array, Y: Array, W: Array) -> Array:
        axes = [
            _mean_of_defined([kendall(X[..., g], Y[..., g], W[:, g]) for g in sets], len(W)) for sets in groups if sets
        ]
        return _mean_of_defined(axes, len(W))

    return kernel


def partial(controls: Array, *, ranks: bool, ranked: int = 0) -> Kernel:
    """Kernel of the correlation of what controls do not explain linearly.

    Args:
        controls: (k, n); indicators of categories among them may be redundant.
        ranks: rank X, Y and the first `ranked` controls within each sample (partial Spearman).
        ranked: how many of the controls are quantities rather than indicators.
    """

    def kernel(X: Array, Y: Array, W: Array) -> Array:
        columns = [X, Y, *controls]
        if ranks:
            columns = [midranks(c, W) if i < 2 + ranked else c for i, c in enumerate(columns)]
        centred = np.stack([_centred(column, W) for column in columns], axis=1)
        moments = (centred * W[:, None, :]) @ centred.transpose(0, 2, 1)
        squares, floors = np.diagonal(moments, axis1=1, axis2=2), np.stack([_floor(c, W) for c in columns], axis=1)
        # Controls on one scale, or the inverse would take one of small numbers beside one of large ones for redundant;
        # those that do not vary in a sample drop out.
        size = np.where(squares > floors, np.sqrt(squares), np.inf)[:, 2:]
        across = moments[:, :2, 2:] / size[:, None, :]
        among = moments[:, 2:, 2:] / (size[:, :, None] * size[:, None, :])
        explained = across @ np.linalg.pinv(among, rcond=1e-10, hermitian=True) @ across.transpose(0, 2, 1)
        left = moments[:, :2, :2] - explained
        xx, yy, xy = left[:, 0, 0], left[:, 1, 1], left[:, 0, 1]
        # Controls that explain one side to within rounding leave nothing to correlate.
        least = np.maximum(1e-9 * squares, floors)
        varies = (xx > least[:, 0]) & (yy > least[:, 1])
        return _ratio(xy, xx * yy, varies)

    return kernel


def midranks(X: Array, W: Array) -> Array:
    """Ranks (B, n) of the values in weighted samples, as if each value were there W times; ties get the mean rank.

    Args:
        X: values (n,) or (B, n).
        W: weights (B, n), not negative.
    """
    X = np.broadcast_to(X, W.shape)
    order = np.argsort(X, axis=1, kind="stable")
    x, w = np.take_along_axis(X, order, axis=1), np.take_along_axis(W, order, axis=1)
    until = w.cumsum(axis=1)
    new = np.ones(x.shape, dtype=bool)
    new[:, 1:] = x[:, 1:] != x[:, :-1]
    last = np.ones(x.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    before = np.maximum.accumulate(np.where(new, until - w, -np.inf), axis=1)
    after = np.minimum.accumulate(np.where(last, until, np.inf)[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(x.shape)
    np.put_along_axis(ranks, order, (before + after + 1) / 2, axis=1)
    return ranks


def _kendall_of_rows(X: Array, Y: Array, W: Array) -> Array:
    sx, sy = _signs(X), _signs(Y)
    pairs = W[:, :, None] * W[:, None, :]
    agreement, px, py = ((pairs * m).sum(axis=(1, 2)) for m in (sx * sy, np.abs(sx), np.abs(sy)))
    return _ratio(agreement, px * py, (px > 0) & (py > 0))


def _signs(values: Array) -> Array:
    return np.asarray(np.sign(values[..., :, None] - values[..., None, :]))


def _centred(X: Array, W: Array) -> Array:
    # Twice: the first mean is off by rounding of large values, the second of small ones.
    once = X - (W * X).sum(axis=1, keepdims=True) / W.sum(axis=1, keepdims=True)
    return np.asarray(once - (W * once).sum(axis=1, keepdims=True) / W.sum(axis=1, keepdims=True))


def _floor(X: Array, W: Array) -> Array:
    size = np.abs(np.broadcast_to(X, W.shape)).max(axis=1)
    return np.asarray(W.sum(axis=1) * (_RELATIVE * size) ** 2)


def _ratio(product: Array, squares: Array, varies: NDArray[np.bool_]) -> Array:
    found = np.full(product.shape, np.nan)
    np.divide(product, np.sqrt(np.maximum(squares, 0.0)), out=found, where=varies & (squares > 0))
    return np.asarray(np.clip(found, -1.0, 1.0))


def _mean_of_defined(parts: Sequence[Array], count: int) -> Array:
    if not parts:
        return np.full(count, np.nan)
    values = np.stack(parts)
    known = ~np.isnan(values)
    total, number = np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
