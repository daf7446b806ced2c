"""Average-case sharpness: the loss or error at randomly displaced weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from robustflat.errors import require_range
from robustflat.flatness.directions import random_direction
from robustflat.flatness.measures.bisection import Bisection
from robustflat.flatness.measures.measure import NEITHER, PER_WEIGHT, TEMPERATURE, Measure, Reading
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.trace import mean_of
from robustflat.types import Weights


class AdaptiveAverage(Measure):
    """E L(w + rho |w| * N(0, I)) - L(w), element by element (Andriushchenko et al., ICML 2023).

    Args:
        rho: relative size > 0.
        draws: >= 1.
    """

    source = "Andriushchenko et al., ICML 2023"
    invariant = PER_WEIGHT

    def __init__(self, rho: float = 0.1, draws: int = 20) -> None:
        require_range("rho", rho, low=0, low_open=True)
        require_range("draws", draws, low=1)
        self.rho, self.draws = rho, draws

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats."""
        scaled = (
            {n: self.rho * surface.weights[n].abs() * e for n, e in d.items()} for d in noise(surface, self.draws)
        )
        rises = rises_at(surface, scaled)
        return Reading(*mean_of(rises.mean(dim=1)), example_error=mean_of(rises.mean(dim=0)).standard_error)


class LowPassFilter(Measure):
    """E L(w + sigma * N(0, I)): the low-pass filtered loss itself, not its rise (Bisla et al., AISTATS 2022).

    Args:
        sigma: standard deviation > 0 (paper: 0.01).
        draws: >= 1 (paper: 100).
    """

    source = "Bisla et al., AISTATS 2022"

    def __init__(self, sigma: float = 0.01, draws: int = 100) -> None:
        require_range("sigma", sigma, low=0, low_open=True)
        require_range("draws", draws, low=1)
        self.sigma, self.draws = sigma, draws

    def __call__(self, surface: LossSurface) -> Reading:
        """Loss in nats; its rise is in the details."""
        start = surface.losses()
        losses = start + rises_at(surface, scaled_noise(surface, self.sigma, self.draws))
        found, over_examples = mean_of(losses.mean(dim=1)), mean_of(losses.mean(dim=0))
        return Reading(*found, {"rise": found.value - float(start.mean())}, over_examples.standard_error)


class PacBayesSigma(Measure):
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

    source = "Jiang et al., ICLR 2020"
    invariant = NEITHER | {TEMPERATURE}

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
        require_range("floor", floor, low=0)
        self.search = Bisection(low, high, bisections)
        self.rise, self.draws, self.magnitude_aware, self.floor = rise, draws, magnitude_aware, floor

    def __call__(self, surface: LossSurface) -> Reading:
        """1 / sigma^2; sigma, the interval left, and whether sigma met the end of the search are in the details."""
        allowed = surface.error() + self.rise
        found = self.search(lambda size: float(self._errors(surface, size).mean()) <= allowed)
        sigma = found.size
        # How far the error of the mean over draws moves sigma, by the slope of the curve there.
        here, above = self._errors(surface, sigma), self._errors(surface, 1.2 * sigma)
        slope = float(above.mean() - here.mean()) / (0.2 * sigma)
        error = 2 * mean_of(here).standard_error / slope / sigma**3 if slope > 0 else math.nan
        details = {"sigma": sigma, "sigma_above": found.above, "at_end": float(found.at_end)}
        return Reading(1 / sigma**2, error, details)

    def _errors(self, surface: LossSurface, sigma: float) -> Tensor:
        """Error at each draw with this sigma, float64 (draws,)."""
        errors = [surface.error(self._scaled(surface, d, sigma)) for d in noise(surface, self.draws)]
        return torch.tensor(errors, dtype=torch.float64)

    def _scaled(self, surface: LossSurface, drawn: Weights, sigma: float) -> Weights:
        if not self.magnitude_aware:
            return {name: sigma * e for name, e in drawn.items()}
        spread = {name: (sigma**2 * w.square() + self.floor**2).sqrt() for name, w in surface.weights.items()}
        return {name: spread[name] * e for name, e in drawn.items()}


class LocalEntropy(Measure):
    """-log of the mean of exp(-beta (L(w + nu) - L(w))) over nu ~ N(0, I / gamma), divided by beta.

    That is minus the local entropy log of the integral of exp(-beta L(w') - gamma |w - w'|^2 / 2) (Chaudhari et al.,
    ICLR 2017), relative to a constant loss L(w), whose integral depends on gamma and the number of weights alone. They
    sample by Langevin dynamics; since beta L is of order 1, plain averages of the weights drawn from the Gaussian do.

    Args:
        gamma: > 0; 1 / sqrt(gamma) is the standard deviation of the displacement of each weight.
        draws: >= 2.
        beta: inverse temperature > 0 (paper: 1). Large ones leave a few draws to decide: see `effective_draws`.
    """

    source = "Chaudhari et al., ICLR 2017"

    def __init__(self, gamma: float = 1e4, draws: int = 50, beta: float = 1.0) -> None:
        require_range("gamma", gamma, low=0, low_open=True)
        require_range("draws", draws, low=2)
        require_range("beta", beta, low=0, low_open=True)
        self.gamma, self.draws, self.beta = gamma, draws, beta

    def __call__(self, surface: LossSurface) -> Reading:
        """In nats; `effective_draws` is (sum of weights)^2 / sum of their squares."""
        rises = rises_at(surface, scaled_noise(surface, self.gamma**-0.5, self.draws)).mean(dim=1)
        logs = -self.beta * rises
        shares = (logs - logs.amax()).exp()
        value = -(float(logs.amax()) + math.log(float(shares.mean()))) / self.beta
        relative = mean_of(shares).standard_error / float(shares.mean())  # error of a logarithm, to first order
        effective = float(shares.sum() ** 2 / shares.square().sum())
        return Reading(value, relative / self.beta, {"effective_draws": effective, "mean_rise": float(rises.mean())})


def noise(surface: LossSurface, draws: int) -> Iterator[Weights]:
    """Standard normal displacements, the same on every call."""
    for number in range(draws):
        yield random_direction(surface.weights, surface.generator("noise", number))


def scaled_noise(surface: LossSurface, sigma: float, draws: int) -> Iterator[Weights]:
    """The same times sigma."""
    return ({name: sigma * e for name, e in drawn.items()} for drawn in noise(surface, draws))


def rises_at(surface: LossSurface, displacements: Iterable[Weights]) -> Tensor:
    """L(w + nu) - L(w) of each example at each displacement, float64 (draws, N)."""
    start = surface.losses()
    return torch.stack([surface.losses(nu) - start for nu in displacements])
