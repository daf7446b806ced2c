"""Worst-case sharpness: the largest loss in a neighbourhood, for the neighbourhoods of the literature."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range
from robustflat.flatness.directions import random_direction
from robustflat.flatness.measures.measure import Reading
from robustflat.flatness.measures.surface import LossSurface
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


def largest_rise(surface: LossSurface, neighbourhood: Neighbourhood, steps: int) -> float:
    """Largest L(w + nu) - L(w) that an ascent finds in the neighbourhood; at least 0 with several steps.

    One step is the first-order maximiser at w, and may even fall. More steps begin at a small random displacement, as
    the gradient at a minimum is 0; they halve the step size and return to the best point when the loss has not grown: a
    simplified Auto-PGD (Croce and Hein, ICML 2020). That is a lower bound of the maximum.

    Args:
        surface: the loss.
        neighbourhood: where to search.
        steps: gradients to spend, >= 1.
    """
    if steps == 1:
        start, slope = surface.slope()
        return surface.value(neighbourhood.project(neighbourhood.steepest(slope))) - start
    start = surface.value()
    drawn = neighbourhood.steepest(random_direction(surface.weights, surface.generator("ascent")))
    nu = {name: _FIRST * step for name, step in drawn.items()}
    best, best_value, best_slope, share = nu, -math.inf, nu, 2.0
    for _ in range(steps):
        value, slope = surface.slope(nu)
        if value > best_value:
            best, best_value, best_slope = nu, value, slope
        else:
            share /= 2
        move = neighbourhood.steepest(best_slope)
        nu = neighbourhood.project({name: step + share * move[name] for name, step in best.items()})
    return max(best_value, surface.value(nu), start) - start


class KeskarSharpness:
    """100 * (max L(w + nu) - L(w)) / (1 + L(w)) over |nu_i| <= epsilon (|w_i| + 1) (Keskar et al., ICLR 2017).

    They maximised with L-BFGS-B in 10 iterations; here it is a projected ascent by signs.

    Args:
        epsilon: > 0 (paper: 1e-3 and 5e-4).
        steps: of the ascent, >= 1.
    """

    def __init__(self, epsilon: float = 1e-3, steps: int = 20) -> None:
        require_range("epsilon", epsilon, low=0, low_open=True)
        require_range("steps", steps, low=1)
        self.epsilon, self.steps = epsilon, steps

    def __call__(self, surface: LossSurface) -> Reading:
        """Percent of 1 + L(w)."""
        box = Box({name: self.epsilon * (w.abs() + 1) for name, w in surface.weights.items()})
        rise = largest_rise(surface, box, self.steps)
        return Reading(100 * rise / (1 + surface.value()), details={"rise": rise})


class SamSharpness:
    """max L(w + nu) - L(w) over |nu|_2 <= rho (Foret et al., ICLR 2021); its mean over groups of m is m-sharpness.

    Args:
        rho: radius > 0.
        steps: 1 is the first-order step of SAM; more search on.
        m: examples in a group, each with a maximisation of its own; `None`: all together.
    """

    def __init__(self, rho: float = 0.05, steps: int = 1, m: int | None = None) -> None:
        require_range("rho", rho, low=0, low_open=True)
        require_range("steps", steps, low=1)
        if m is not None:
            require_range("m", m, low=1)
        self.rho, self.steps, self.m = rho, steps, m

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats; the standard error is over groups."""
        sphere = Ellipsoid({name: torch.ones_like(w) for name, w in surface.weights.items()}, self.rho)
        return _grouped(surface, sphere, self.steps, self.m)


class AdaptiveSharpness:
    """max L(w + nu) - L(w) over |nu / |w||_p <= rho, element by element (Kwon et al., ICML 2021).

    Wrap the network in `NormalizedLogits` for the variant of Andriushchenko et al. (ICML 2023).

    Args:
        rho: radius > 0.
        norm: p, 2 or infinity (in YAML `.inf`).
        steps: of the ascent, >= 1.
        m: as for `SamSharpness`.
    """

    def __init__(self, rho: float = 0.01, norm: float = math.inf, steps: int = 20, m: int | None = None) -> None:
        require_range("rho", rho, low=0, low_open=True)
        require_range("steps", steps, low=1)
        if m is not None:
            require_range("m", m, low=1)
        if norm not in (2, math.inf):
            raise UserError(f"norm must be 2 or infinity (in YAML .inf), got {norm!r}.")
        self.rho, self.norm, self.steps, self.m = rho, norm, steps, m

    def __call__(self, surface: LossSurface) -> Reading:
        """Rise of the loss, in nats; the standard error is over groups."""
        sizes = {name: w.abs() for name, w in surface.weights.items()}
        where: Neighbourhood = Ellipsoid(sizes, self.rho)
        if self.norm == math.inf:
            where = Box({name: self.rho * size for name, size in sizes.items()})
        return _grouped(surface, where, self.steps, self.m)


def _grouped(surface: LossSurface, where: Neighbourhood, steps: int, m: int | None) -> Reading:
    if m is None:
        return Reading(largest_rise(surface, where, steps))
    rises, sizes = [], []
    for part in surface.parts(m):
        rises.append(largest_rise(part, where, steps))
        sizes.append(len(part.labels))
        surface.passes += part.passes * len(part.labels) // max(len(surface.labels), 1)
    values = torch.tensor(rises, dtype=torch.float64)
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Reading(float(values @ shares), error, {"groups": float(len(values))})


def _length(v: Weights) -> Tensor:
    total = torch.stack([t.square().sum() for t in v.values()]).sum().sqrt()
    return total.clamp_min(torch.finfo(total.dtype).tiny)
