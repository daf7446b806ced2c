"""Regression line with its band, and correlation corrected for noise in the measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from robustflat.errors import UserError
from robustflat.reporting.bootstrap import Resampling
from robustflat.reporting.correlation_result import Correlation
from robustflat.reporting.estimate import Asked, estimated, undefined
from robustflat.reporting.kernels import Array, pearson
from robustflat.reporting.paired import Values, column, paired


@dataclass(frozen=True)
class Line:
    """Least-squares line y = intercept + slope x with intervals by Student's t.

    Attributes:
        x, y: names.
        intercept, slope: NaN if not defined, and then `why` says why.
        intercept_interval, slope_interval: (low, high).
        spread: standard deviation of y around the line (n - 2 degrees of freedom).
        n: models.
        confidence: of intervals and band.
        middle, squares: mean of x and sum of squares around it; what the band is computed from.
        why: why there is no line.
    """

    x: str
    y: str
    intercept: float = math.nan
    slope: float = math.nan
    intercept_interval: tuple[float, float] = (math.nan, math.nan)
    slope_interval: tuple[float, float] = (math.nan, math.nan)
    spread: float = math.nan
    n: int = 0
    confidence: float = 0.95
    middle: float = math.nan
    squares: float = math.nan
    why: str = ""

    @property
    def defined(self) -> bool:
        """Whether there is a line."""
        return not math.isnan(self.slope)

    def at(self, x: ArrayLike) -> Array:
        """The line at x (m,)."""
        return np.asarray(self.intercept + self.slope * np.asarray(x, dtype=np.float64))

    def band(self, x: ArrayLike, *, prediction: bool = False) -> tuple[Array, Array]:
        """Lower and upper end (m,) of the band at x (m,): of the line, or of a further model's y (`prediction`)."""
        values = np.asarray(x, dtype=np.float64)
        if not self.defined:
            return np.full(values.shape, np.nan), np.full(values.shape, np.nan)
        variance = 1 / self.n + (values - self.middle) ** 2 / self.squares + (1.0 if prediction else 0.0)
        half = _quantile(self.n - 2, self.confidence) * self.spread * np.sqrt(variance)
        return self.at(values) - half, self.at(values) + half

    def sentence(self) -> str:
        """The line in words."""
        if not self.defined:
            return f"No line of {self.y} against {self.x}. {self.why}"
        low, high = self.slope_interval
        return (
            f"Over {self.n} models, {self.y} = {self.intercept:.3f} {'-' if self.slope < 0 else '+'} "
            f"{abs(self.slope):.3f} x {self.x}; slope {self.slope:.2f} [{low:.2f}, {high:.2f}] "
            f"({100 * self.confidence:g} %, Student's t), spread around the line {self.spread:.2g}."
        )

    def __str__(self) -> str:
        return self.sentence()


def regression_line(x: Values, y: Values, *, names: tuple[str, str] = ("x", "y"), confidence: float = 0.95) -> Line:
    """Least-squares line of y against x; models without both values are left out.

    The band holds if models scatter independently and evenly around the line.

    Raises:
        UserError: if the columns differ in length, or confidence is not in (0, 1).
    """
    Resampling(confidence=confidence)
    data = paired(x, y, names)
    n = len(data.x)
    middle = float(data.x.mean()) if n else math.nan
    squares = float(((data.x - middle) ** 2).sum())
    if n < 3 or squares <= n * (1e-12 * float(np.abs(data.x).max())) ** 2:
        return Line(*names, n=n, confidence=confidence, why=data.why or f"All {n} models have the same {names[0]}.")
    slope = float(((data.x - middle) * (data.y - data.y.mean())).sum()) / squares
    intercept = float(data.y.mean()) - slope * middle
    spread = math.sqrt(float(((data.y - intercept - slope * data.x) ** 2).sum()) / (n - 2))
    reach = _quantile(n - 2, confidence) * spread
    of_slope, of_intercept = reach / math.sqrt(squares), reach * math.sqrt(1 / n + middle**2 / squares)
    return Line(
        *names, intercept, slope, (intercept - of_intercept, intercept + of_intercept),
        (slope - of_slope, slope + of_slope), spread, n, confidence, middle, squares,
    )  # fmt: skip


def corrected_for_noise(
    x: Values,
    y: Values,
    x_stderr: Values,
    y_stderr: Values,
    *,
    names: tuple[str, str] = ("x", "y"),
    settings: Resampling | None = None,
) -> Correlation:
    """Pearson's r that noise-free measurements would have (Spearman 1904): r / sqrt(reliability x, reliability y).

    Reliability is the share of the variance over models that is not the mean squared standard error. Valid if errors of
    the two measurements are independent: not when both come from the same few examples.

    Args:
        x, y: (n,) values of n models.
        x_stderr, y_stderr: (n,) their standard errors, >= 0; a model without one is left out.
        names: of x and y in sentences.
        settings: of the interval, by default BCa over models at 95 %.

    Raises:
        UserError: if columns differ in length or a standard error is negative.
    """
    errors = [
        column(x_stderr, f"the standard error of {names[0]}"),
        column(y_stderr, f"the standard error of {names[1]}"),
    ]
    if any((values < 0).any() for values in errors):
        raise UserError("Standard errors must not be negative.")
    data = paired(x, y, names, others=errors)
    noise_x, noise_y = (values[data.kept] ** 2 for values in errors)

    def kernel(X: Array, Y: Array, W: Array) -> Array:
        parts = []
        for values, noise in ((X, noise_x), (Y, noise_y)):
            total = W.sum(axis=1)
            mean = (W @ values) / total
            variance = (W * (values[None, :] - mean[:, None]) ** 2).sum(axis=1) / np.maximum(total - 1, 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                share = 1 - (W @ noise) / total / variance
            parts.append(np.where(share > 0, share, np.nan))
        return np.asarray(np.clip(pearson(X, Y, W) / np.sqrt(parts[0] * parts[1]), -1.0, 1.0))

    asked = Asked(kernel, "other", "noise-corrected Pearson", names, settings or Resampling())
    if not data.why and math.isnan(float(kernel(data.x, data.y, np.ones((1, len(data.x))))[0])):
        return undefined(asked, data, "The standard errors are as large as the differences between models.")
    found = estimated(data, asked)
    note = "Assumes that errors of the two measurements are independent."
    return replace(found, cautions=(*found.cautions, note))


def _quantile(free: int, confidence: float) -> float:
    return float(special.stdtrit(free, 0.5 + confidence / 2))
