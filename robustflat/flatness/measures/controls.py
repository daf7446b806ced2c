"""Measures that are not flatness, to control for: norms, distance from initialisation, margins, spectral norms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from robustflat.attacks.objectives import margin
from robustflat.errors import UserError, require_range
from robustflat.flatness.directions import direction_to
from robustflat.flatness.measures.measure import Reading
from robustflat.flatness.measures.surface import LossSurface
from robustflat.types import Weights


class WeightNorm:
    """|w|_2 over the chosen parameters."""

    def __call__(self, surface: LossSurface) -> Reading:
        """The norm; no pass over the examples."""
        return Reading(_norm(surface.weights))


class DistanceFromStart:
    """|w - w_0|_2 to the weights that training began with (Jiang et al., ICLR 2020).

    Args:
        start: state dict of the initial network.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start = start

    def __call__(self, surface: LossSurface) -> Reading:
        """The distance; relative to |w| in the details.

        Raises:
            UserError: if the state dict does not fit.
        """
        distance = _norm(direction_to(surface.weights, self.start))
        return Reading(distance, details={"relative": distance / max(_norm(surface.weights), 1e-300)})


class InverseMargin:
    """1 / margin^2, the margin being a low quantile over examples of z_y - max_{k != y} z_k (Jiang et al., ICLR 2020).

    Args:
        quantile: in [0, 1] (paper: 0.1).
    """

    def __init__(self, quantile: float = 0.1) -> None:
        require_range("quantile", quantile, low=0, high=1)
        self.quantile = quantile

    def __call__(self, surface: LossSurface) -> Reading:
        """Infinite where that quantile of the margins is not positive."""
        margins = -margin(surface.logits(), surface.labels).double()
        low = float(torch.quantile(margins, self.quantile))
        return Reading(1 / low**2 if low > 0 else math.inf, details={"margin": low, "mean": float(margins.mean())})


class SpectralNorms:
    """Sum of log spectral norms of all weights with two or more dimensions, each as a matrix (out, rest)."""

    def __call__(self, surface: LossSurface) -> Reading:
        """The logarithm of the product; no pass over the examples.

        Raises:
            UserError: if no weight has two dimensions.
        """
        matrices = [w.flatten(1).double() for w in surface.weights.values() if w.ndim > 1]
        if not matrices:
            raise UserError("Spectral norms need a weight with at least two dimensions.")
        return Reading(sum(math.log(max(float(torch.linalg.matrix_norm(m, 2)), 1e-300)) for m in matrices))


def _norm(w: Weights) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in w.values()))
