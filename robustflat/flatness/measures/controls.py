"""Measures that are not flatness, to control for: weight, spectral and path norms, margins."""

from __future__ import annotations

import math

import torch

from robustflat.attacks.objectives import margin
from robustflat.errors import UserError, require_range
from robustflat.flatness.directions import total_norm
from robustflat.flatness.measures.measure import (
    BATCH_NORM_FOLDING,
    LAYER_SCALING,
    NONE,
    PER_LAYER,
    PERMUTATION,
    TEMPERATURE,
    Measure,
    Reading,
)
from robustflat.flatness.measures.surface import LossSurface
from robustflat.models.paths import squared_path_norm


class WeightNorm(Measure):
    """|w|_2 over the chosen parameters."""

    source = "Jiang et al., ICLR 2020"
    invariant = frozenset({PERMUTATION, TEMPERATURE})
    losses = NONE

    def __call__(self, surface: LossSurface) -> Reading:
        """The norm; no pass over the examples."""
        return Reading(total_norm(surface.weights))


class InverseMargin(Measure):
    """1 / margin^2, the margin being a low quantile over examples of z_y - max_{k != y} z_k (Jiang et al., ICLR 2020).

    Args:
        quantile: in [0, 1] (paper: 0.1).
    """

    source = "Jiang et al., ICLR 2020"
    invariant = PER_LAYER | {BATCH_NORM_FOLDING}

    def __init__(self, quantile: float = 0.1) -> None:
        require_range("quantile", quantile, low=0, high=1)
        self.quantile = quantile

    def __call__(self, surface: LossSurface) -> Reading:
        """Infinite where that quantile of the margins is not positive."""
        margins = -margin(surface.logits(), surface.labels).double()
        low = float(torch.quantile(margins, self.quantile))
        return Reading(1 / low**2 if low > 0 else math.inf, details={"margin": low, "mean": float(margins.mean())})


class SpectralNorms(Measure):
    """Sum of log spectral norms of all weights with two or more dimensions, each as a matrix (out, rest)."""

    source = "Jiang et al., ICLR 2020"
    invariant = frozenset({PERMUTATION, TEMPERATURE, LAYER_SCALING})
    losses = NONE

    def __call__(self, surface: LossSurface) -> Reading:
        """The logarithm of the product; no pass over the examples.

        Raises:
            UserError: if no weight has two dimensions.
        """
        matrices = [w.flatten(1).double() for w in surface.weights.values() if w.ndim > 1]
        if not matrices:
            raise UserError("Spectral norms need a weight with at least two dimensions.")
        return Reading(sum(math.log(max(float(torch.linalg.matrix_norm(m, 2)), 1e-300)) for m in matrices))


class PathNorm(Measure):
    """Square root of the sum over paths from input to output of the product of squared weights.

    Neyshabur et al. (COLT 2015). Of the whole network after its standardisation of the images, batch norm as the
    scaling that it is in eval mode; biases and shifts are left out.
    """

    source = "Neyshabur et al., COLT 2015"
    invariant = PER_LAYER | {BATCH_NORM_FOLDING}
    losses = NONE

    def __call__(self, surface: LossSurface) -> Reading:
        """The norm; its natural logarithm is in the details.

        Raises:
            UserError: if the network is not positively homogeneous without its biases.
        """
        squared = squared_path_norm(surface.found.model, surface.found.batches[0].x[:1])
        surface.passes += 1
        return Reading(math.sqrt(squared), details={"log": 0.5 * math.log(max(squared, 1e-300))})
