"""Lanczos and its quadrature against dense eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.flatness.lanczos import Lanczos, quadrature
from tests.unit.flatness.networks import spectrum


def dense(values: Tensor) -> Tensor:
    return spectrum(*values.tolist())


def start(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_both_ends_agree_with_dense_eigenvalues_after_many_restarts() -> None:
    values = torch.cat([torch.linspace(-0.3, 1, 195), torch.tensor([1.1, 2, 2.1, 5, 50])]).double()
    matrix = dense(values)
    ends = Lanczos(tolerance=1e-8, basis=24, max_products=2000)(lambda v: v @ matrix, start(200), top=4, bottom=2)
    assert ends.converged
    assert torch.allclose(ends.top.values, torch.tensor([50, 5, 2.1, 2]).double(), rtol=1e-10)
    assert torch.allclose(ends.bottom.values, values[:2], rtol=1e-8)


def test_residuals_are_true_distances_and_vectors_have_length_one() -> None:
    matrix = dense(torch.linspace(-1, 3, 60).double())
    ends = Lanczos(tolerance=1e-6, basis=30)(lambda v: v @ matrix, start(60), top=2, bottom=3)
    for pairs in ends[:2]:
        images = pairs.vectors @ matrix
        expected = (images - pairs.values[:, None] * pairs.vectors).norm(dim=1)
        assert torch.allclose(pairs.residuals, expected, atol=1e-12)
        assert torch.allclose(pairs.vectors.norm(dim=1), torch.ones(len(pairs.values)).double())


def test_a_tiny_budget_is_reported_as_not_converged_and_the_bound_still_holds() -> None:
    exact = torch.linspace(-1, 3, 100).double()
    matrix = dense(exact)
    ends = Lanczos(max_products=6)(lambda v: v @ matrix, start(100), top=2, bottom=2)
    assert not ends.converged
    for pairs in ends[:2]:
        nearest = (exact[:, None] - pairs.values).abs().amin(dim=0)
        assert bool((nearest <= pairs.residuals).all())


def test_a_small_matrix_is_solved_completely_even_with_multiple_eigenvalues() -> None:
    matrix = dense(torch.tensor([2, 2, 2, 1, 0, 0]).double())
    ends = Lanczos()(lambda v: v @ matrix, start(6), top=3, bottom=3)
    assert torch.allclose(ends.top.values, torch.full((3,), 2.0).double())
    assert torch.allclose(ends.bottom.values, torch.tensor([0, 0, 1]).double(), atol=1e-10)


def test_a_zero_matrix_and_single_precision_work() -> None:
    ends = Lanczos()(lambda v: 0 * v, start(5), top=1, bottom=1)
    assert ends.converged and float(ends.top.values[0]) == 0.0
    matrix = dense(torch.linspace(-1, 3, 50).double()).float()
    ends = Lanczos(tolerance=1e-3)(lambda v: v @ matrix, start(50, torch.float32), top=1, bottom=0)
    assert ends.top.values.dtype == torch.float32
    assert float(ends.top.values[0]) == pytest.approx(3, rel=1e-4)


def test_too_many_pairs_or_a_product_that_is_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="need top and bottom <= 4"):
        Lanczos()(lambda v: v, start(4), top=5, bottom=2)
    with pytest.raises(UserError, match="basis of at least 12"):
        Lanczos(basis=10)(lambda v: v, start(40), top=3, bottom=3)
    with pytest.raises(UserError, match="not finite"):
        Lanczos()(lambda v: v * torch.nan, start(4), top=1, bottom=0)


def test_quadrature_gives_moments_of_the_start_vector_exactly() -> None:
    matrix, v = dense(torch.linspace(-1, 3, 40).double()), start(40)
    nodes, weights = quadrature(lambda rows: rows @ matrix, v, 5)
    assert float(weights.sum()) == pytest.approx(1)
    for power in range(10):
        expected = v @ torch.linalg.matrix_power(matrix, power) @ v / (v @ v)
        assert float((weights * nodes**power).sum()) == pytest.approx(float(expected), rel=1e-9)
