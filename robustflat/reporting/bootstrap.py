"""Bootstrap distributions of coefficients and intervals from them; analytic intervals for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from robustflat.errors import require_one_of, require_range
from robustflat.reporting.kernels import Array, Kernel

INTERVALS = ("auto", "analytic", "percentile", "bca")
_MOST_LOST = 0.2
"""Share of undefined bootstrap samples (nothing varies in them) from which on there is no interval."""


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        interval: "analytic" (Fisher's z and its relatives), "percentile" or "bca" (bootstrap), or "auto", the one
            that covers best; see `robustflat.reporting.correlation.correlation`.
        confidence: coverage, in (0, 1).
        resamples: bootstrap samples or permutations, >= 100.
        generator: source of the draws; None takes a fixed one, so that a report never changes by itself.

    Raises:
        UserError: if a value is outside its range.
    """

    interval: str = "auto"
    confidence: float = 0.95
    resamples: int = 2000
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        require_one_of("interval", self.interval, INTERVALS)
        require_range("confidence", self.confidence, low=0.0, high=1.0, low_open=True, high_open=True)
        require_range("resamples", self.resamples, low=100)

    def draws(self) -> torch.Generator:
        """The generator to draw from."""
        return torch.Generator().manual_seed(0) if self.generator is None else self.generator


class Range(NamedTuple):
    """Ends of an interval; NaN if there is none."""

    low: float
    high: float


def counts(size: int, samples: int, generator: torch.Generator) -> Array:
    """How often each of `size` units is drawn, (samples, size); rows sum to `size`."""
    drawn = torch.randint(size, (samples, size), generator=generator).numpy()
    cells = drawn + size * np.arange(samples)[:, None]
    return np.bincount(cells.ravel(), minlength=samples * size).reshape(samples, size).astype(np.float64)


def bootstrap_interval(
    samples: Array,
    value: float,
    *,
    units: int,
    settings: Resampling,
    jackknife: Array | None = None,
    stretched: bool = True,
) -> Range:
    """Interval from a bootstrap distribution, widened for few units.

    Percentiles may be taken further out by the factor t(units - 1) sqrt(units / (units - 1)) / normal quantile
    (Hesterberg 2015): without it, intervals of Pearson's r from a dozen units are too narrow. Rank correlations do not
    need it, because the ties of a bootstrap sample spread them already.

    Args:
        samples: (B,) bootstrap values; NaN where undefined.
        value: the estimate itself.
        units: independent units that were resampled, >= 3.
        settings: coverage.
        jackknife: (units,) values without one unit each: gives the acceleration of BCa (Efron 1987). None: a plain
            percentile interval.
        stretched: take percentiles further out.
    """
    known = samples[~np.isnan(samples)]
    if math.isnan(value) or len(known) < (1 - _MOST_LOST) * len(samples) or units < 3:
        return Range(math.nan, math.nan)
    tail = (1 - settings.confidence) / 2
    reach = -float(special.ndtri(tail))
    if stretched:
        reach = -math.sqrt(units / (units - 1)) * float(special.stdtrit(units - 1, tail))
    z = np.array([-reach, reach])
    if jackknife is not None:
        z = _corrected(z, known, value, jackknife)
    low, high = np.quantile(known, special.ndtr(z))
    return Range(float(low), float(high))


def bias_corrected_normal(samples: Array, value: float, confidence: float) -> Range:
    """Normal interval on the scale of arctanh, moved by the bias that the bootstrap shows.

    For noise that pulls all bootstrap values to one side of the estimate, where percentiles, corrected or not, would
    have to be taken from beyond the most extreme sample.

    Args:
        samples: (B,) bootstrap values in [-1, 1]; NaN where undefined.
        value: the estimate, in (-1, 1).
        confidence: coverage.
    """
    known = samples[np.abs(samples) < 1]
    if len(known) < (1 - _MOST_LOST) * len(samples):
        return Range(math.nan, math.nan)
    scaled = np.arctanh(known)
    centre = 2 * math.atanh(value) - float(scaled.mean())
    half = float(special.ndtri(0.5 + confidence / 2)) * float(scaled.std(ddof=1))
    return Range(math.tanh(centre - half), math.tanh(centre + half))


def _corrected(z: Array, samples: Array, value: float, jackknife: Array) -> Array:
    """Normal quantiles moved by bias and acceleration."""
    near = np.abs(samples - value) <= 1e-12
    below = float(((samples < value) & ~near).mean() + near.mean() / 2)
    bias = float(special.ndtri(min(max(below, 1 / len(samples)), 1 - 1 / len(samples))))
    parts = jackknife[~np.isnan(jackknife)]
    change = parts.mean() - parts if len(parts) else np.zeros(1)
    scale = float((change**2).sum()) ** 1.5
    acceleration = float((change**3).sum()) / (6 * scale) if scale > 1e-30 else 0.0
    shifted = bias + z
    return np.asarray(bias + shifted / np.maximum(1 - acceleration * shifted, 0.1))


def analytic_interval(value: float, *, method: str, n: int, controls: int, confidence: float) -> Range:
    """Interval on the scale of arctanh, where the spread hardly depends on the coefficient.

    Standard errors there: Pearson 1 / sqrt(n - 3) (Fisher), Spearman sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright
    2000), Kendall sqrt(0.437 / (n - 4)) (Fieller, Hartley and Pearson 1957); each control takes one from n. They hold
    for data that a monotone map of each side makes normal (Pearson: that are normal).
    """
    if math.isnan(value):
        return Range(math.nan, math.nan)
    free = n - controls - (4 if method == "kendall" else 3)
    if free < 1:
        return Range(-1.0, 1.0)
    if abs(value) >= 1.0:
        return Range(math.nan, math.nan)
    spread = {"pearson": 1.0, "spearman": 1 + value**2 / 2, "kendall": 0.437}[method]
    half = float(special.ndtri(0.5 + confidence / 2)) * math.sqrt(spread / free)
    return Range(math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half))


@dataclass(frozen=True)
class Units:
    """What is resampled: models, or clusters of models."""

    member: NDArray[np.intp]
    """(n,) number of the unit of each model."""
    count: int

    def weights(self, settings: Resampling, generator: torch.Generator) -> Array:
        """Weights (B, n) of the models in bootstrap samples."""
        return counts(self.count, settings.resamples, generator)[:, self.member]

    def without_one(self) -> Array:
        """Weights (count, n) that leave out one unit each."""
        kept = self.member[None, :] != np.arange(self.count)[:, None]
        return np.asarray(kept, dtype=np.float64)


def over_units(kernel: Kernel, x: Array, y: Array, units: Units, settings: Resampling) -> tuple[Array, Array]:
    """Bootstrap values (B,) and jackknife values (units,) of a coefficient."""
    drawn = units.weights(settings, settings.draws())
    return kernel(x, y, drawn), kernel(x, y, units.without_one())
