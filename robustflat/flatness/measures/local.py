"""Sharpness from derivatives at the weights: gradient norm, Fisher-Rao, scale-normalised traces, relative flatness."""

from __future__ import annotations

import math

import torch

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.flatness.directions import total_norm
from robustflat.flatness.lanczos import Lanczos
from robustflat.flatness.measures.measure import (
    BATCH_NORM_FOLDING,
    PER_LAYER,
    PER_WEIGHT,
    SMOOTH,
    Measure,
    Reading,
)
from robustflat.flatness.measures.surface import LossSurface
from robustflat.flatness.trace import mean_of, signs, trace_estimates
from robustflat.geometry.weight_ball import WeightBall


class GradientNorm(Measure):
    """|gradient of L at w|_2: what flatness measures of first order start from (Zhang et al., CVPR 2023).

    On the re-attacked loss it is the gradient on the examples found at w (Danskin), as on the frozen one.
    """

    source = "Zhang et al., CVPR 2023"

    def __call__(self, surface: LossSurface) -> Reading:
        """In nats per unit of weight."""
        return Reading(total_norm(surface.slope()[1]))


class FisherRao(Measure):
    """w^T F w with the Fisher matrix F of the loss (Liang et al., AISTATS 2019), from the definition.

    Their closed form for bias-free ReLU networks is not used: batch norm and biases break it.

    Args:
        labels: "model": the exact expectation over the model's own labels; "true": with the true labels.
    """

    source = "Liang et al., AISTATS 2019"
    invariant = PER_WEIGHT
    losses = SMOOTH

    def __init__(self, labels: str = "model") -> None:
        require_one_of("labels", labels, ("model", "true"))
        self.labels = labels

    def __call__(self, surface: LossSurface) -> Reading:
        """The squared norm; its root is in the details."""
        curvature = "gauss_newton" if self.labels == "model" else "empirical_fisher"
        products = surface.products(curvature=curvature)
        w = products.flat(surface.weights)
        value = float(w @ products(w))
        surface.passes += 4
        return Reading(value, details={"root": math.sqrt(max(value, 0.0))})


class ScaledTrace(Measure):
    """sum over layers of |w_l|^2 tr H_l: a trace that scaling one layer up and the next down leaves alone.

    After Tsuzuku et al. (ICML 2020). It is the trace of the Hessian in units of each layer's norm, estimated by
    Hutchinson's method with vectors |w_l| s_l of random signs s: each draw, not only their mean, is invariant.

    Args:
        draws: random vectors, one product each, >= 1.
        grouping: "layer"; or "filter": |w_f|^2 tr H_f for every output filter of convolutions.
    """

    source = "Tsuzuku et al., ICML 2020"
    invariant = PER_LAYER
    losses = SMOOTH

    def __init__(self, draws: int = 20, grouping: str = "layer") -> None:
        require_range("draws", draws, low=1)
        require_one_of("grouping", grouping, ("layer", "filter"))
        self.draws, self.grouping = draws, grouping

    def __call__(self, surface: LossSurface) -> Reading:
        """The sum over the layers (tensors) or filters of w."""
        products = surface.products()
        sizes = WeightBall(1.0, grouping=self.grouping).sizes(surface.weights)
        units = products.flat({name: sizes[name].expand_as(w) for name, w in surface.weights.items()})
        # As bytes, since all rows in full would be the largest thing in memory.
        small = torch.empty(0, dtype=torch.int8, device=units.device)
        drawn = signs((self.draws, len(units)), small, surface.generator("scaled trace"))
        samples = torch.stack([row @ products(row) for row in (units * s for s in drawn)])
        surface.passes += 4 * self.draws
        return Reading(*mean_of(samples.cpu()))


class RelativeFlatness(Measure):
    """sum over rows s, s' of one layer's matrix W of <w_s, w_s'> tr H_{s,s'} (Petzka et al., NeurIPS 2021).

    H_{s,s'} holds the second derivatives by rows s and s'. Estimated without bias as the mean of <V, H V> with
    V = (W a) b^T for random signs a and b: the expectation of V_si V_s'i' is <w_s, w_s'> if i = i', else 0.

    Args:
        layer: name of a weight with two dimensions; `None`: the last one of the network.
        draws: random vectors, >= 1.
    """

    source = "Petzka et al., NeurIPS 2021"
    invariant = PER_LAYER | {BATCH_NORM_FOLDING}
    losses = SMOOTH

    def __init__(self, layer: str | None = None, draws: int = 50) -> None:
        require_range("draws", draws, low=1)
        self.layer, self.draws = layer, draws

    def __call__(self, surface: LossSurface) -> Reading:
        """The sum.

        Raises:
            UserError: if there is no such layer.
        """
        matrices = [name for name, w in surface.weights.items() if w.ndim == 2]
        name = self.layer or (matrices[-1] if matrices else "")
        if name not in matrices:
            raise UserError(f"'{name}' is no weight with two dimensions. Choose of: {', '.join(matrices) or 'none'}.")
        products = surface.products(names=[name])
        w = surface.weights[name].double()
        generator = surface.generator("relative flatness")
        rows = signs((self.draws, w.shape[1]), w, generator) @ w.T  # (draws, out)
        columns = signs((self.draws, w.shape[1]), w, generator)
        drawn = (torch.outer(row, column).flatten() for row, column in zip(rows, columns, strict=True))
        samples = torch.stack([vector @ products(vector) for vector in drawn])
        surface.passes += 4 * self.draws
        return Reading(*mean_of(samples.cpu()))


class LargestEigenvalue(Measure):
    """Largest eigenvalue of the Hessian of L, by Lanczos' iteration.

    Args:
        lanczos: tolerance, limit and memory of the search; `None`: `Lanczos()`.
    """

    source = "Keskar et al., ICLR 2017; Stutz et al., ICCV 2021"
    losses = SMOOTH

    def __init__(self, lanczos: Lanczos | None = None) -> None:
        self.lanczos = lanczos or Lanczos()

    def __call__(self, surface: LossSurface) -> Reading:
        """The eigenvalue, and as standard error its residual: an exact one lies that close."""
        products = surface.products()
        like = torch.empty(products.dimension, dtype=products.dtype, device=products.device)
        generator = surface.generator("lanczos")
        start = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        found = self.lanczos(products, start, top=1, bottom=0)
        surface.passes += 4 * products.count
        value, residual = float(found.top.values[0]), float(found.top.residuals[0])
        return Reading(value, residual, {"converged": float(found.converged)})


class HessianTrace(Measure):
    """tr H of the Hessian of L, by Hutch++.

    Args:
        products: with vectors, >= 6.
    """

    source = "Yao et al., IEEE Big Data 2020"
    losses = SMOOTH

    def __init__(self, products: int = 60) -> None:
        require_range("products", products, low=6)
        self.count = products

    def __call__(self, surface: LossSurface) -> Reading:
        """The trace; the Frobenius norm is in the details."""
        products = surface.products()
        like = torch.empty(products.dimension, dtype=products.dtype, device=products.device)
        found = trace_estimates(products, like, count=self.count, generator=surface.generator("trace"))
        surface.passes += 4 * products.count
        details = {"frobenius": found.frobenius.value, "frobenius_standard_error": found.frobenius.standard_error}
        return Reading(*found.trace, details)
