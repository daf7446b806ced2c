"""Average-case sharpness: the loss or error at randomly displaced weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from robustflat.errors import require_range
from robustflat.flatness.directions import random_direction
from robustflat.flatness.measures.measure import Reading
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.trace import mean_of
from robustflat.types import Weights


class AdaptiveAverage:
    """E L(w + rho |w| * N(0, I)) - L(w), element by element (Andriushchenko et al., ICML 2023).

    Args:
        rho: relative size > 0.
        draws: >= 1.
    """

    def __init__(self, rho: float = 0.1, draws: int = 20) -> None:
        require_range("rho", rho, low=0, low_open=True)
        require_range("draws", draws, low=1)
        self.rho, self.draws = rho, draws

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats."""
        reference = surface.value()
        scaled = (
            {n: self.rho * surface.weights[n].abs() * e for n, e in d.items()} for d in _noise(surface, self.draws)
        )
        rises = torch.tensor([surface.value(nu) - reference for nu in scaled], dtype=torch.float64)
        return Reading(*mean_of(rises))


class LowPassFilter:
    """E L(w + sigma * N(0, I)): the low-pass filtered loss itself, not its rise (Bisla et al., AISTATS 2022).

    Args:
        sigma: standard deviation > 0 (paper: 0.01).
        draws: >= 1 (paper: 100).
    """

    def __init__(self, sigma: float = 0.01, draws: int = 100) -> None:
        require_range("sigma", sigma, low=0, low_open=True)
        require_range("draws", draws, low=1)
        self.sigma, self.draws = sigma, draws

    def __call__(self, surface: LossSurface) -> Reading:
        """Loss in nats; its rise is in the details."""
        moved = ({name: self.sigma * e for name, e in d.items()} for d in _noise(surface, self.draws))
        found = mean_of(torch.tensor([surface.value(nu) for nu in moved], dtype=torch.float64))
        return Reading(*found, details={"rise": found.value - surface.value()})


class PacBayesSigma:
    """1 / sigma^2 for the largest sigma at which noise raises the error by at most `rise` (Jiang et al., ICLR 2020).

    sigma is the *standard deviation* of the noise (a published implementation passes the variance). All sigmas share
    their draws, so the bisection sees a fixed function. Magnitude-aware: noise of variance sigma^2 w_i^2 + floor^2.

    Args:
        rise: of the error, in (0, 1).
        draws: >= 1 per sigma.
        bisections: halvings of the interval of log sigma, >= 1.
        low, high: the interval that sigma is searched in.
        magnitude_aware: see above.
        floor: its smallest noise.
    """

    def __init__(
        self,
        rise: float = 0.1,
        *,
        draws: int = 10,
        bisections: int = 15,
        low: float = 1e-5,
        high: float = 10.0,
        magnitude_aware: bool = False,
        floor: float = 1e-3,
    ) -> None:
        require_range("rise", rise, low=0, high=1, low_open=True, high_open=True)
        require_range("draws", draws, low=1)
        require_range("bisections", bisections, low=1)
        require_range("low", low, low=0, low_open=True)
        require_range("high", high, low=low, low_open=True)
        require_range("floor", floor, low=0)
        self.rise, self.draws, self.bisections = rise, draws, bisections
        self.low, self.high, self.magnitude_aware, self.floor = low, high, magnitude_aware, floor

    def __call__(self, surface: LossSurface) -> Reading:
        """1 / sigma^2; sigma, the interval left, and whether sigma met the end of the search are in the details."""
        allowed = surface.error() + self.rise
        low, high = math.log(self.low), math.log(self.high)
        for _ in range(self.bisections):
            middle = (low + high) / 2
            low, high = (middle, high) if self._error(surface, math.exp(middle)) <= allowed else (low, middle)
        sigma = math.exp(low)
        at_end = float(low == math.log(self.low) or high == math.log(self.high))
        return Reading(1 / sigma**2, math.nan, {"sigma": sigma, "sigma_above": math.exp(high), "at_end": at_end})

    def _error(self, surface: LossSurface, sigma: float) -> float:
        """Mean error over the draws at this sigma."""
        errors = [surface.error(self._scaled(surface, d, sigma)) for d in _noise(surface, self.draws)]
        return sum(errors) / len(errors)

    def _scaled(self, surface: LossSurface, drawn: Weights, sigma: float) -> Weights:
        if not self.magnitude_aware:
            return {name: sigma * e for name, e in drawn.items()}
        spread = {name: (sigma**2 * w.square() + self.floor**2).sqrt() for name, w in surface.weights.items()}
        return {name: spread[name] * e for name, e in drawn.items()}


def _noise(surface: LossSurface, draws: int) -> Iterator[Weights]:
    """Standard normal displacements, the same on every call."""
    for number in range(draws):
        yield random_direction(surface.weights, surface.generator("noise", number))
