"""Eigenvalues at both ends of a symmetric matrix, and its spectral density, from products with vectors alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range

Products: TypeAlias = Callable[[Tensor], Tensor]
"""Rows (k, n) -> rows times a symmetric matrix, (k, n)."""

_CHECK_EVERY = 8
"""Products between two looks at the small eigenvalue problem."""


class Eigenpairs(NamedTuple):
    """Eigenvalues (k,) from the outermost inward, unit vectors (k, n), and |A v - value v| of each (k,).

    Some exact eigenvalue lies within the residual of each value.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Ends(NamedTuple):
    """Both ends of a spectrum, and whether all residuals met the tolerance."""

    top: Eigenpairs
    bottom: Eigenpairs
    converged: bool


@dataclass(frozen=True)
class Lanczos:
    """How hard to work for the ends of a spectrum.

    Lanczos' iteration with full reorthogonalisation (twice, so that no copies of found eigenvalues appear), and a
    thick restart when the basis is full (Wu and Simon, SIAM J. Matrix Anal. Appl. 2000): the wanted Ritz vectors
    and as many again are kept. One start vector finds one vector per *distinct* eigenvalue: of a multiple
    eigenvalue at most a few copies appear, by rounding.

    Attributes:
        tolerance: a pair counts as converged when its residual is below tolerance * |value| (or what the
            precision allows at the scale of the largest one).
        max_products: give up after this many products with the matrix; the residuals then say how far it came.
        basis: vectors kept in memory, each of n numbers.
    """

    tolerance: float = 1e-4
    max_products: int = 500
    basis: int = 80

    def __post_init__(self) -> None:
        require_range("tolerance", self.tolerance, low=0, low_open=True, high=1)
        require_range("max_products", self.max_products, low=1)
        require_range("basis", self.basis, low=3)

    @torch.no_grad()
    def __call__(self, products: Products, start: Tensor, *, top: int, bottom: int) -> Ends:
        """The `top` largest and `bottom` smallest eigenvalues.

        Args:
            products: the matrix.
            start: (n,) random vector, not zero; its type and device are used throughout.
            top, bottom: how many pairs, 0 to n; together at most half the basis, unless that holds n vectors.

        Raises:
            UserError: if more pairs are wanted than n or the basis allows, or a product is not finite.
        """
        size = start.numel()
        if max(top, bottom) > size or (2 * (top + bottom) > self.basis and size > self.basis):
            raise UserError(
                f"{top} largest and {bottom} smallest eigenvalues of a matrix of size {size} need top and bottom <= "
                f"{size} and a Lanczos basis of at least {2 * (top + bottom)} vectors, got {self.basis}."
            )
        state = _Krylov(products, start, min(self.basis, size))
        spent = 0
        while True:
            spent += state.extend(min(_CHECK_EVERY, self.max_products - spent))
            full = state.used == state.capacity
            if not full and state.used < top + bottom and spent < self.max_products:
                continue
            values, small = state.ritz()
            wanted = _outermost(len(values), top, bottom)
            estimates = state.coupling * small[-1, wanted].abs()
            done = bool((estimates <= self._allowed(values)[wanted]).all()) or state.complete
            if done or spent >= self.max_products:
                break
            if full:
                state.restart(_outermost(len(values), *_kept(top, bottom, state.capacity)))
        return self._measured(products, values, small.T @ state.filled, (top, bottom))

    def _allowed(self, values: Tensor) -> Tensor:
        """Largest residual of a converged pair, for each value."""
        scale = values.abs().amax()
        floor = 32 * torch.finfo(values.dtype).eps * scale
        return (self.tolerance * values.abs()).clamp_min(floor)

    def _measured(self, products: Products, values: Tensor, vectors: Tensor, wanted: tuple[int, int]) -> Ends:
        """Ends with residuals from one more product each, not from the recurrence."""
        top, bottom = min(wanted[0], len(values)), min(wanted[1], len(values))
        order = [*range(len(values) - 1, len(values) - 1 - top, -1), *range(bottom)]
        chosen = vectors[order]
        chosen = chosen / chosen.norm(dim=1, keepdim=True)
        images = products(chosen) if order else chosen
        values_again = (chosen * images).sum(dim=1)
        residuals = (images - values_again[:, None] * chosen).norm(dim=1)
        allowed = self._allowed(torch.cat([values, values_again]))[len(values) :]
        # The recurrence's estimate and the measured residual differ by rounding: allow for it.
        converged = bool((residuals <= 2 * allowed).all()) and (top, bottom) == wanted
        pairs = [Eigenpairs(values_again[s], chosen[s], residuals[s]) for s in (slice(0, top), slice(top, None))]
        return Ends(pairs[0], pairs[1], converged)


def _kept(top: int, bottom: int, capacity: int) -> tuple[int, int]:
    """How many Ritz vectors survive a restart at each end: the wanted ones and as many again."""
    spare = max((capacity // 2 - top - bottom) // 2, 0)
    return top + (min(spare, top + 5) if top else 0), bottom + (min(spare, bottom + 5) if bottom else 0)


def _outermost(count: int, top: int, bottom: int) -> list[int]:
    """Indices of the bottom and top values among `count` ascending ones."""
    return sorted({*range(min(bottom, count)), *range(max(count - top, 0), count)})


class _Krylov:
    """Orthonormal basis, the matrix projected on it, and the vector that comes next."""

    def __init__(self, products: Products, start: Tensor, capacity: int) -> None:
        self.products, self.capacity = products, capacity
        self.rows = start.new_zeros(capacity, start.numel())
        self.projected = start.new_zeros(capacity, capacity)
        self.next = start / start.norm()
        self.used = 0
        self.coupling = math.inf
        """Norm of what the last product had outside of the basis."""

    @property
    def filled(self) -> Tensor:
        """The basis (used, n)."""
        return self.rows[: self.used]

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.used == self.rows.shape[1]

    def extend(self, budget: int) -> int:
        """Fill the basis, with at most `budget` products; returns how many."""
        count = 0
        while self.used < self.capacity and count < budget:
            self._step()
            count += 1
        return count

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors (columns) of the projected matrix."""
        small = self.projected[: self.used, : self.used].double()
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        return values.to(self.rows), vectors.to(self.rows)

    def restart(self, keep: list[int]) -> None:
        """Replace the basis by the Ritz vectors with these indices."""
        values, vectors = self.ritz()
        kept = vectors[:, keep].T @ self.filled
        self.rows.zero_()
        self.projected.zero_()
        self.used = len(keep)
        self.rows[: self.used] = kept
        self.projected[range(self.used), range(self.used)] = values[keep]

    def _step(self) -> None:
        index = self.used
        self.rows[index] = self.next
        self.used += 1
        image = self.products(self.next[None])[0]
        if not bool(image.isfinite().all()):
            raise UserError("A curvature product is not finite: is the loss itself finite, and twice differentiable?")
        length = image.norm()
        overlaps, rest = _orthogonal(image, self.filled)
        self.projected[: self.used, index] = overlaps
        self.projected[index, : self.used] = overlaps
        self.coupling = float(rest.norm())
        if self.coupling <= 8 * torch.finfo(rest.dtype).eps * float(length) and not self.complete:
            # The basis is invariant: go on from a new direction, to which nothing couples.
            rest, self.coupling = self._fresh(rest), 0.0
        self.next = rest / rest.norm().clamp_min(torch.finfo(rest.dtype).tiny)

    def _fresh(self, like: Tensor) -> Tensor:
        draws = torch.Generator(like.device).manual_seed(self.used)
        drawn = torch.randn(like.shape, generator=draws, dtype=like.dtype, device=like.device)
        return _orthogonal(drawn, self.filled)[1]


def _orthogonal(vector: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Components along orthonormal rows, and what is left of a vector without them; twice is enough."""
    first = rows @ vector
    rest = vector - first @ rows
    second = rows @ rest
    return first + second, rest - second @ rows


@torch.no_grad()
def quadrature(products: Products, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes (m,) and weights (m,), which sum to 1, of Gauss' rule for the spectral measure of a start vector.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 2017): for random starts, the mean
    over starts of sum_i weight_i f(node_i) estimates tr f(A) / n; exact for polynomials of degree below 2 m in
    the measure of the start vector.

    Args:
        products: the matrix A (n, n).
        start: (n,) random vector, not zero.
        steps: m, at most n are done.
    """
    state = _Krylov(products, start, min(steps, start.numel()))
    state.extend(state.capacity)
    values, vectors = state.ritz()
    return values, vectors[0].square()
