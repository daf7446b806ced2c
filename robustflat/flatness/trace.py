"""Trace and Frobenius norm of a symmetric matrix from products with random vectors, with standard errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.errors import require_one_of, require_range
from robustflat.flatness.lanczos import Products

ESTIMATORS = ("hutchinson", "hutch++")
_ROWS_AT_ONCE = 8


class Estimate(NamedTuple):
    """A number known up to chance: its estimate and the standard error of that (0 if exact)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return with_error(self.value, self.standard_error)


def with_error(value: float, error: float) -> str:
    """A number to the digits that its standard error leaves, and that error to two.

    >>> with_error(167.0912, 3.14159), with_error(0.5, 0.0), with_error(0.5, math.nan)
    ('167.1 +- 3.1', '0.5', '0.5 (no error bar)')
    """
    if math.isnan(error):
        return f"{value:.6g} (no error bar)"
    if not (math.isfinite(value) and 0 < error < math.inf):
        return f"{value:.6g}"
    last = math.floor(math.log10(error)) - 1  # exponent of the second digit of the error
    digits = min(max(1, math.floor(math.log10(abs(value) or error)) - last + 1), 8)
    return f"{value:.{digits}g} +- {error:.2g}"


class TraceEstimates(NamedTuple):
    """tr A, |A|_F^2 and |A|_F of one matrix, from `products` products."""

    trace: Estimate
    squared_frobenius: Estimate
    frobenius: Estimate
    products: int


def signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1 with equal chances, of `like`'s type and device."""
    # Bytes are drawn from the same stream as wider integers, in an eighth of the memory.
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=generator.device)
    return drawn.mul_(2).sub_(1).to(like)


@torch.no_grad()
def trace_estimates(
    products: Products,
    like: Tensor,
    *,
    count: int,
    generator: torch.Generator,
    estimator: str = "hutch++",
) -> TraceEstimates:
    """Unbiased estimates of trace and squared Frobenius norm.

    "hutchinson" (Commun. Stat. 1989): the means of v.Av and |Av|^2 over vectors v of random signs.
    "hutch++" (Meyer, Musco, Musco and Woodruff, SOSA 2021): a third of the products finds the range Q of A roughly,
    a third gives the traces of Q^T A Q and Q^T A^2 Q exactly, and the rest estimates what lies outside of Q. When count
    reaches three times n, everything is exact. Standard errors come from the spread of the random vectors; they do not
    exist for fewer than two of these.

    Args:
        products: the matrix A (n, n).
        like: (n,) tensor that gives size, type and device.
        count: products to spend in all, >= 2 (hutchinson) or >= 6 (hutch++).
        generator: source of the vectors.
        estimator: one of `ESTIMATORS`.

    Raises:
        UserError: if count is too small or the estimator unknown.
    """
    require_one_of("estimator", estimator, ESTIMATORS)
    require_range("trace products", count, low=6 if estimator == "hutch++" else 2)
    size = like.numel()
    sketch = min(count // 3, size) if estimator == "hutch++" else 0
    basis = _range(products, like, sketch, generator)
    images = _in_blocks(products, basis)
    exact = ((basis * images).sum().item(), images.square().sum().item())
    rest = 0 if sketch == size else count - 2 * sketch
    draws = _outside(signs((rest, size), like, generator), basis)
    images = _in_blocks(products, draws)
    # Outside of Q: tr(P A P) from v.Av, and tr(P A^2 P) from |Av|^2, with v = P s.
    traces, squares = (draws * images).sum(dim=1), images.square().sum(dim=1)
    trace, squared = _plus(exact[0], traces), _plus(exact[1], squares)
    return TraceEstimates(trace, squared, root(squared), 2 * sketch + rest)


def mean_of(samples: Tensor) -> Estimate:
    """Mean of independent samples (m,) and its standard error; NaN for the latter with one sample."""
    error = float(samples.std(correction=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(float(samples.mean()), error)


def root(squared: Estimate) -> Estimate:
    """Square root, with the standard error carried through to first order."""
    value = math.sqrt(max(squared.value, 0.0))
    return Estimate(value, squared.standard_error / (2 * value) if value else squared.standard_error)


def _range(products: Products, like: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal rows (rank, n) that span the image of random vectors."""
    sketch = _in_blocks(products, signs((rank, like.numel()), like, generator))
    return torch.linalg.qr(sketch.T)[0].T if rank else sketch


def _outside(rows: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    return rows


def _in_blocks(products: Products, rows: Tensor) -> Tensor:
    if not len(rows):
        return rows
    return torch.cat([products(part) for part in torch.split(rows, _ROWS_AT_ONCE)])


def _plus(exact: float, samples: Tensor) -> Estimate:
    if not len(samples):
        return Estimate(exact, 0.0)
    rest = mean_of(samples.double())
    return Estimate(exact + rest.value, rest.standard_error)
