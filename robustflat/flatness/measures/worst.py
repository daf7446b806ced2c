"""Worst-case sharpness: the largest loss in a neighbourhood, for the neighbourhoods of the literature."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range
from robustflat.flatness.directions import random_direction, total_norm
from robustflat.flatness.measures.bisection import Bisection
from robustflat.flatness.measures.measure import PER_WEIGHT, TEMPERATURE, Measure, Reading
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.trace import mean_of
from robustflat.types import Weights

_FIRST = 0.1
"""Size of the first displacement of an ascent, as a share of the neighbourhood."""


class Neighbourhood(Protocol):
    """A set of displacements around 0, fixed for given weights."""

    @abstractmethod
    def steepest(self, slope: Weights) -> Weights:
        """The displacement of the set that a linear function with this slope rises most along."""

    @abstractmethod
    def project(self, nu: Weights) -> Weights:
        """A displacement brought into the set."""

    @abstractmethod
    def scaled(self, noise: Weights) -> Weights:
        """A displacement on the set's surface, from noise in units of the set: equally far for any scale of w."""


class Box:
    """|nu_i| <= limit_i for each weight."""

    def __init__(self, limits: Weights) -> None:
        self.limits = limits

    def steepest(self, slope: Weights) -> Weights:
        """The corner that the signs of the slope point to."""
        return {name: limit * slope[name].sign() for name, limit in self.limits.items()}

    def project(self, nu: Weights) -> Weights:
        """Every entry clamped."""
        return {name: nu[name].clamp(-limit, limit) for name, limit in self.limits.items()}

    def scaled(self, noise: Weights) -> Weights:
        """A corner, by the signs of the noise."""
        return self.steepest(noise)


class Ellipsoid:
    """|nu / c|_2 <= radius over all weights together, with axes c_i >= 0; where c_i is 0, nu_i is."""

    def __init__(self, axes: Weights, radius: float) -> None:
        self.axes, self.radius = axes, radius

    def steepest(self, slope: Weights) -> Weights:
        """The displacement radius * c^2 g / |c g|."""
        length = _length({name: c * slope[name] for name, c in self.axes.items()})
        return {name: c * c * slope[name] * (self.radius / length) for name, c in self.axes.items()}

    def project(self, nu: Weights) -> Weights:
        """Scaled back to the surface, which in units of c is the nearest point."""
        length = _length(
            {name: torch.where(c > 0, nu[name] / c.clamp_min(1e-30), 0.0) for name, c in self.axes.items()}
        )
        share = float((self.radius / length).clamp_max(1.0))
        return {name: share * step for name, step in nu.items()}

    def scaled(self, noise: Weights) -> Weights:
        """Radius * c * noise / |noise|."""
        length = _length(noise)
        return {name: c * noise[name] * (self.radius / length) for name, c in self.axes.items()}


class Rise(NamedTuple):
    """Largest rise found, standard deviation of what the starts found, and standard error over examples."""

    value: float
    spread: float
    example_error: float


def largest_rise(surface: LossSurface, where: Neighbourhood, steps: int, restarts: int = 1) -> Rise:
    """Largest L(w + nu) - L(w) that ascents find in the neighbourhood; at least 0 with several steps.

    One step is the first-order maximiser at w, and may even fall. More steps begin at a small random displacement, as
    the gradient at a minimum is 0; they halve the step size and return to the best point when the loss has not grown: a
    simplified Auto-PGD (Croce and Hein, ICML 2020). That is a lower bound of the maximum.

    Args:
        surface: the loss.
        where: where to search.
        steps: gradients to spend in each ascent, >= 1.
        restarts: ascents with several steps, each from a start of its own, >= 1.
    """
    start = surface.losses()
    if steps == 1:
        _, slope = surface.slope()
        rises = surface.losses(where.project(where.steepest(slope))) - start
        return Rise(float(rises.mean()), 0.0, mean_of(rises).standard_error)
    found = [ascend(surface, where, steps, restart) for restart in range(restarts)]
    values = torch.stack([losses.mean() for losses in found]) - start.mean()
    best = found[int(values.argmax())] - start
    if float(best.mean()) < 0:
        best = torch.zeros_like(start)
    spread = float(values.std()) if restarts > 1 else math.nan
    return Rise(float(best.mean()), spread, mean_of(best).standard_error)


def ascend(surface: LossSurface, where: Neighbourhood, steps: int, restart: int) -> Tensor:
    """Losses (N,) at the best point of one ascent; see `largest_rise`."""
    drawn = where.scaled(random_direction(surface.weights, surface.generator("ascent", restart)))
    nu = {name: _FIRST * step for name, step in drawn.items()}
    best, best_value, best_slope, share = nu, -math.inf, nu, 2.0
    for _ in range(steps):
        value, slope = surface.slope(nu)
        if value > best_value:
            best, best_value, best_slope = nu, value, slope
        else:
            share /= 2
        move = where.steepest(best_slope)
        nu = where.project({name: step + share * move[name] for name, step in best.items()})
    last, before = surface.losses(nu), surface.losses(best)
    return last if float(last.mean()) > float(before.mean()) else before


class KeskarSharpness(Measure):
    """100 * (max L(w + nu) - L(w)) / (1 + L(w)) over |nu_i| <= epsilon (|w_i| + 1) (Keskar et al., ICLR 2017).

    They maximised with L-BFGS-B in 10 iterations; here it is a projected ascent by signs.

    Args:
        epsilon: > 0 (paper: 1e-3 and 5e-4).
        steps: of each ascent, >= 1.
        restarts: ascents, >= 1.
    """

    source = "Keskar et al., ICLR 2017"

    def __init__(self, epsilon: float = 1e-3, steps: int = 20, restarts: int = 2) -> None:
        require_range("epsilon", epsilon, low=0, low_open=True)
        require_range("steps", steps, low=1)
        require_range("restarts", restarts, low=1)
        self.epsilon, self.steps, self.restarts = epsilon, steps, restarts

    def __call__(self, surface: LossSurface) -> Reading:
        """Percent of 1 + L(w)."""
        box = Box({name: self.epsilon * (w.abs() + 1) for name, w in surface.weights.items()})
        rise = largest_rise(surface, box, self.steps, self.restarts)
        percent = 100 / (1 + surface.value())
        return Reading(percent * rise.value, percent * rise.spread, {"rise": rise.value}, percent * rise.example_error)


class SamSharpness(Measure):
    """max L(w + nu) - L(w) over |nu|_2 <= rho (Foret et al., ICLR 2021); its mean over groups of m is m-sharpness.

    Args:
        rho: radius > 0.
        steps: 1 is the first-order step of SAM; more search on.
        m: examples in a group, each with a maximisation of its own; `None`: all together.
        restarts: ascents where there are several steps, >= 1.
    """

    source = "Foret et al., ICLR 2021"

    def __init__(self, rho: float = 0.05, steps: int = 1, m: int | None = None, restarts: int = 2) -> None:
        require_range("rho", rho, low=0, low_open=True)
        _require_search(steps, m, restarts)
        self.rho, self.steps, self.m, self.restarts = rho, steps, m, restarts

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats; with groups, the standard error is over these."""
        sphere = Ellipsoid({name: torch.ones_like(w) for name, w in surface.weights.items()}, self.rho)
        return _grouped(surface, sphere, self.steps, self.m, self.restarts)


class AdaptiveSharpness(Measure):
    """max L(w + nu) - L(w) over |nu / |w||_p <= rho, element by element (Kwon et al., ICML 2021).

    `LogitNormalized` makes it the variant of Andriushchenko et al. (ICML 2023).

    Args:
        rho: radius > 0.
        norm: p, 2 or infinity (in YAML `.inf`).
        steps: of each ascent, >= 1.
        m: as for `SamSharpness`.
        restarts: ascents, >= 1.
    """

    source = "Kwon et al., ICML 2021"
    invariant = PER_WEIGHT

    def __init__(
        self, rho: float = 0.01, norm: float = math.inf, steps: int = 20, m: int | None = None, restarts: int = 2
    ) -> None:
        require_range("rho", rho, low=0, low_open=True)
        _require_search(steps, m, restarts)
        if norm not in (2, math.inf):
            raise UserError(f"norm must be 2 or infinity (in YAML .inf), got {norm!r}.")
        self.rho, self.norm, self.steps, self.m, self.restarts = rho, norm, steps, m, restarts

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats; with groups, the standard error is over these."""
        sizes = {name: w.abs() for name, w in surface.weights.items()}
        where: Neighbourhood = Ellipsoid(sizes, self.rho)
        if self.norm == math.inf:
            where = Box({name: self.rho * size for name, size in sizes.items()})
        return _grouped(surface, where, self.steps, self.m, self.restarts)


class FirstOrderFlatness(Measure):
    """rho * max |gradient of L at w + nu|_2 over |nu|_2 <= rho (Zhang et al., CVPR 2023: gradient-norm aware, GAM).

    Ascent on the gradient's norm, whose own gradient is H g / |g|; one product per step.

    Args:
        rho: radius > 0.
        steps: of each ascent, >= 1.
        restarts: ascents, >= 1.
    """

    source = "Zhang et al., CVPR 2023"
    losses = ("clean", "frozen")

    def __init__(self, rho: float = 0.1, steps: int = 10, restarts: int = 2) -> None:
        require_range("rho", rho, low=0, low_open=True)
        require_range("steps", steps, low=1)
        require_range("restarts", restarts, low=1)
        self.rho, self.steps, self.restarts = rho, steps, restarts

    def __call__(self, surface: LossSurface) -> Reading:
        """Rho times the largest norm found, in nats."""
        sphere = Ellipsoid({name: torch.ones_like(w) for name, w in surface.weights.items()}, self.rho)
        found = torch.tensor([self._ascent(surface, sphere, r) for r in range(self.restarts)], dtype=torch.float64)
        at_w = total_norm(surface.slope()[1])
        spread = self.rho * float(found.std()) if self.restarts > 1 else math.nan
        return Reading(self.rho * max(float(found.max()), at_w), spread, {"gradient_norm": at_w})

    def _ascent(self, surface: LossSurface, sphere: Ellipsoid, restart: int) -> float:
        """Largest norm of the gradient on one ascent."""
        drawn = sphere.scaled(random_direction(surface.weights, surface.generator("gradient ascent", restart)))
        nu = {name: _FIRST * step for name, step in drawn.items()}
        best, best_norm, best_uphill, share = nu, -math.inf, nu, 2.0
        for _ in range(self.steps):
            norm, uphill = surface.gradient_norm_slope(nu)
            if norm > best_norm:
                best, best_norm, best_uphill = nu, norm, uphill
            else:
                share /= 2
            move = sphere.steepest(best_uphill)
            nu = sphere.project({name: step + share * move[name] for name, step in best.items()})
        return max(best_norm, total_norm(surface.slope(nu)[1]))


class PacBayesWorstCase(Measure):
    """1 / alpha^2 for the largest alpha at which no |nu_i| <= alpha raises the error by more than `rise`.

    The sharpness bound of Jiang et al. (ICLR 2020). The error has no gradient: the ascent is on the loss, and the
    largest error on its way counts. Magnitude-aware: |nu_i| <= alpha |w_i| + floor.

    Args:
        rise: of the error, in (0, 1).
        steps: of the ascent at each alpha, >= 1.
        bisections: halvings of the interval of log alpha, >= 1.
        low, high: the interval that alpha is searched in.
        magnitude_aware, floor: see above.
    """

    source = "Jiang et al., ICLR 2020"
    open = frozenset({TEMPERATURE})

    def __init__(
        self,
        rise: float = 0.1,
        *,
        steps: int = 10,
        bisections: int = 12,
        low: float = 1e-6,
        high: float = 1.0,
        magnitude_aware: bool = False,
        floor: float = 1e-3,
    ) -> None:
        require_range("rise", rise, low=0, high=1, low_open=True, high_open=True)
        require_range("steps", steps, low=1)
        require_range("floor", floor, low=0)
        self.search = Bisection(low, high, bisections)
        self.rise, self.steps, self.magnitude_aware, self.floor = rise, steps, magnitude_aware, floor

    def __call__(self, surface: LossSurface) -> Reading:
        """1 / alpha^2; alpha, the interval left, and whether alpha met the end of the search are in the details."""
        allowed = surface.error() + self.rise
        alpha, above, _, at_end = self.search(lambda size: self._error(surface, size) <= allowed)
        return Reading(1 / alpha**2, math.nan, {"alpha": alpha, "alpha_above": above, "at_end": float(at_end)})

    def _error(self, surface: LossSurface, alpha: float) -> float:
        """Largest error that a sign ascent meets in the box."""
        sizes = {n: w.abs() if self.magnitude_aware else torch.ones_like(w) for n, w in surface.weights.items()}
        floor = self.floor if self.magnitude_aware else 0.0
        box = Box({name: alpha * size + floor for name, size in sizes.items()})
        drawn = box.scaled(random_direction(surface.weights, surface.generator("error ascent")))
        nu = {name: _FIRST * step for name, step in drawn.items()}
        worst = 0.0
        for _ in range(self.steps):
            move = box.steepest(surface.slope(nu)[1])
            nu = box.project({name: step + move[name] / 2 for name, step in nu.items()})
            worst = max(worst, surface.error(nu))
        return worst


def _grouped(surface: LossSurface, where: Neighbourhood, steps: int, m: int | None, restarts: int) -> Reading:
    if m is None:
        rise = largest_rise(surface, where, steps, restarts)
        return Reading(rise.value, rise.spread, example_error=rise.example_error)
    rises, sizes, spent = [], [], 0.0
    for part in surface.parts(m):
        rises.append(largest_rise(part, where, steps, restarts).value)
        sizes.append(len(part.labels))
        spent += part.passes * len(part.labels) / len(surface.labels)
    surface.passes += round(spent)
    values = torch.tensor(rises, dtype=torch.float64)
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Reading(float(values @ shares), error, {"groups": float(len(values))})


def _require_search(steps: int, m: int | None, restarts: int) -> None:
    require_range("steps", steps, low=1)
    require_range("restarts", restarts, low=1)
    if m is not None:
        require_range("m", m, low=1)


def _length(v: Weights) -> Tensor:
    total = torch.stack([t.square().sum() for t in v.values()]).sum().sqrt()
    return total.clamp_min(torch.finfo(total.dtype).tiny)
