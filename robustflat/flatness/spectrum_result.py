"""What a curvature measurement returns, printed to as many digits as have converged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustflat.errors import UserError, require_one_of
from robustflat.flatness.lanczos import Eigenpairs
from robustflat.flatness.trace import Estimate, mean_of
from robustflat.types import Weights


class SpectralDensity:
    """Nodes and weights (probes, steps) of stochastic Lanczos quadrature; the weights of each probe sum to 1."""

    def __init__(self, nodes: Tensor, weights: Tensor) -> None:
        self.nodes, self.weights = nodes, weights

    def at(self, points: Tensor, sigma: float) -> Tensor:
        """Density at points (m,), each node widened to a Gaussian of standard deviation sigma; integrates to 1."""
        gaps = (points.double()[:, None, None] - self.nodes.double()) / sigma
        bumps = torch.exp(-gaps.square() / 2) / (sigma * math.sqrt(2 * math.pi))
        return (bumps * self.weights.double()).sum(dim=2).mean(dim=1)

    def moment(self, power: int) -> Estimate:
        """Tr A^power / n with the standard error over probes."""
        return mean_of((self.weights.double() * self.nodes.double() ** power).sum(dim=1))


@dataclass(frozen=True, eq=False)
class SpectrumResult:
    """Ends of the spectrum of a curvature matrix and what was estimated of the rest.

    Every eigenvalue carries a residual r = |C v - value v|: an exact eigenvalue lies within r of it, and it is
    printed to that precision only.

    Attributes:
        top: largest eigenvalues, descending; vectors on the CPU.
        bottom: smallest, ascending.
        converged: whether all residuals met the tolerance.
        trace, frobenius: with standard errors; `None` if not asked for.
        density: of the spectrum; `None` if not asked for.
        names, shapes: of the weights, in the order of the vectors' entries.
        curvature: "hessian", "gauss_newton", "fisher" or "empirical_fisher".
        loss: "clean", or "frozen": on adversarial examples found once, at these weights.
        reduction: "mean" over examples, or "sum_over_batches".
        precision: "fp32" or "fp64".
        parameters: in words.
        attack: in words; "none" for clean.
        examples, batches: how many.
        products: products with vectors in all.
        seed: of all draws.
        seconds: duration.
    """

    top: Eigenpairs
    bottom: Eigenpairs
    converged: bool
    trace: Estimate | None
    frobenius: Estimate | None
    density: SpectralDensity | None
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    curvature: str
    loss: str
    reduction: str
    precision: str
    parameters: str
    attack: str
    examples: int
    batches: int
    products: int
    seed: int
    seconds: float

    @property
    def value(self) -> float:
        """Largest eigenvalue; NaN if none was asked for."""
        return float(self.top.values[0]) if len(self.top.values) else math.nan

    @property
    def non_convexity(self) -> float:
        """|lambda_min| / |lambda_max| (Li et al., NeurIPS 2018); NaN without both ends."""
        if not len(self.top.values) or not len(self.bottom.values):
            return math.nan
        return abs(float(self.bottom.values[0])) / max(abs(self.value), math.ulp(0.0))

    def direction(self, index: int = 0, end: str = "top") -> Weights:
        """Eigenvector number `index` from the top or bottom end, as name -> tensor; unit length over all.

        Raises:
            UserError: for another end, or if fewer were asked for.
        """
        require_one_of("end", end, ("top", "bottom"))
        vectors = (self.top if end == "top" else self.bottom).vectors
        if not -len(vectors) <= index < len(vectors):
            raise UserError(f"There are {len(vectors)} eigenvectors at the {end} end, got index {index}.")
        vector = vectors[index]
        parts = torch.split(vector, [shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without vectors; not-a-number becomes `None`."""
        plain: dict[str, Any] = {
            "value": self.value,
            "largest": self.top.values.tolist(),
            "largest_residuals": self.top.residuals.tolist(),
            "smallest": self.bottom.values.tolist(),
            "smallest_residuals": self.bottom.residuals.tolist(),
            "non_convexity": self.non_convexity,
        }
        for name in ("trace", "frobenius"):
            estimate = getattr(self, name)
            plain[name] = None if estimate is None else estimate.value
            plain[f"{name}_standard_error"] = None if estimate is None else estimate.standard_error
        if self.density is not None:
            plain["density_nodes"] = self.density.nodes.tolist()
            plain["density_weights"] = self.density.weights.tolist()
        for name in _SETTINGS:
            plain[name] = getattr(self, name)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    def __str__(self) -> str:
        """One line: both ends with their converged digits, the estimates, and what was measured how."""
        parts = []
        for label, pairs in (("largest", self.top), ("smallest", self.bottom)):
            if len(pairs.values):
                digits = map(converged_digits, pairs.values.tolist(), pairs.residuals.tolist())
                parts.append(f"{label} {', '.join(digits)}")
        if len(self.top.values) and len(self.bottom.values):
            spread = float(self.bottom.residuals[0]) + float(self.top.residuals[0]) * self.non_convexity
            ratio = converged_digits(self.non_convexity, spread / max(abs(self.value), math.ulp(0.0)))
            parts.append(f"|min|/|max| {ratio}")
        parts += [f"trace {self.trace}"] if self.trace is not None else []
        parts += [f"Frobenius norm {self.frobenius}"] if self.frobenius is not None else []
        head = "; ".join(parts) + ("" if self.converged else "; NOT converged")
        return (
            f"{head} ({self.curvature} of the {self.loss} loss, {self.reduction} of {self.examples} examples in "
            f"{self.batches} batch(es), {self.parameters}, attack {self.attack}, {self.precision}, "
            f"{self.products} products, seed {self.seed}, {self.seconds:.1f} s)"
        )


_SETTINGS = (
    *("converged", "curvature", "loss", "reduction", "precision", "parameters", "attack"),
    *("examples", "batches", "products", "seed", "seconds"),
)


def converged_digits(value: float, residual: float) -> str:
    """`value` to the digits that an error of `residual` leaves certain, at most 8; "?" if it leaves none.

    >>> converged_digits(60.12031, 0.003), converged_digits(-1.41, 0.2), converged_digits(0.1, 0.5)
    ('60.12', '-1', '?')
    """
    if not math.isfinite(value) or residual >= abs(value) > 0:
        return "?"
    if value == 0:
        return "0"
    leading = math.floor(math.log10(abs(value)))
    # The last digit printed is the first whose unit is at least twice the residual.
    last = math.ceil(math.log10(2 * residual)) if residual > 0 else leading - 7
    digits = min(leading - last + 1, 8)
    if digits < 1:
        return "?"
    text = f"{value:#.{digits}g}"
    return text.removesuffix(".")
