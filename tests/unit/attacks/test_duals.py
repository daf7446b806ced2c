"""Projections with a box, against linear programs, sorting and brute force."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from robustflat.attacks.duals import kth_largest, project_l1, shortest_to_plane
from robustflat.geometry.input_ball import L1Ball


def problem(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    point = torch.rand(5, size, generator=generator, dtype=torch.float64)
    point[:, 0], point[:, 1] = 0.0, 1.0
    normal = torch.randn(5, size, generator=generator, dtype=torch.float64)
    normal[:, 2] = 0.0
    return point, normal


def linear_program(norm: str, point: Tensor, normal: Tensor, gap: float) -> float:
    """Least norm of d = p - q with <normal, d> = gap and point + d in [0, 1]."""
    size = len(point)
    up, down = (1 - point).tolist(), point.tolist()
    rows = torch.cat([normal, -normal]).tolist()
    if norm == "l1":
        bounds = [(0, v) for v in up + down]
        return float(linprog([1.0] * (2 * size), A_eq=[rows], b_eq=[gap], bounds=bounds).fun)
    both = [[float(i == j) for j in range(2 * size)] + [-1.0] for i in range(2 * size)]
    bounds = [(0, v) for v in up + down] + [(0, None)]
    cost = [0.0] * (2 * size) + [1.0]
    return float(linprog(cost, A_ub=both, b_ub=[0.0] * (2 * size), A_eq=[[*rows, 0.0]], b_eq=[gap], bounds=bounds).fun)


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("share", [-0.9, -0.2, 0.3, 0.8])
def test_step_to_a_plane_is_as_short_as_the_linear_program_says(norm: str, share: float) -> None:
    point, normal = problem()
    reach = (
        (normal.clamp_min(0) * (1 - point) - normal.clamp_max(0) * point).sum(1)
        if share > 0
        else (-normal.clamp_max(0) * (1 - point) + normal.clamp_min(0) * point).sum(1)
    )
    gap = share * reach
    step = shortest_to_plane(norm, point, normal, gap, 0.0, 1.0)
    torch.testing.assert_close((normal * step).sum(1), gap, rtol=1e-6, atol=1e-9)
    assert bool(((point + step >= -1e-12) & (point + step <= 1 + 1e-12)).all())
    size = step.abs().sum(1) if norm == "l1" else step.abs().amax(1)
    best = [linear_program(norm, p, n, float(g)) for p, n, g in zip(point, normal, gap, strict=True)]
    torch.testing.assert_close(size, torch.tensor(best, dtype=torch.float64), rtol=2e-3, atol=1e-9)


def test_step_to_a_plane_in_l2_is_as_short_as_a_solver_finds() -> None:
    point, normal = problem(1, 6)
    gap = torch.full((5,), 0.7, dtype=torch.float64)
    step = shortest_to_plane("l2", point, normal, gap, 0.0, 1.0)
    for row in range(5):
        p, n = point[row].numpy(), normal[row].numpy()
        found = minimize(
            lambda d: float(d @ d),
            step[row].numpy() * 0,
            jac=lambda d: 2 * d,
            bounds=[(-v, 1 - v) for v in p],
            constraints=[{"type": "eq", "fun": lambda d, n=n: float(n @ d - 0.7), "jac": lambda d, n=n: n}],
        )
        if found.success:
            assert float(step[row].square().sum()) == pytest.approx(found.fun, rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_plane_out_of_reach_gives_the_corner_nearest_to_it(norm: str) -> None:
    point, normal = problem()
    step = shortest_to_plane(norm, point, normal, torch.full((5,), 1e3, dtype=torch.float64), 0.0, 1.0)
    corner = torch.where(normal > 0, 1 - point, -point) * (normal != 0)
    torch.testing.assert_close(step, corner)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_zero_normal_gives_no_step(norm: str) -> None:
    point, _ = problem()
    step = shortest_to_plane(norm, point, torch.zeros_like(point), torch.ones(5, dtype=torch.float64), 0.0, 1.0)
    assert bool((step == 0).all())


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e15])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_steps_do_not_depend_on_the_scale_of_the_plane(norm: str, scale: float) -> None:
    point, normal = (v.float() for v in problem())
    gap = torch.full((5,), 0.4)
    plain = shortest_to_plane(norm, point, normal, gap, 0.0, 1.0)
    scaled = shortest_to_plane(norm, point, normal * scale, gap * scale, 0.0, 1.0)
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 12.0])
def test_l1_projection_agrees_with_the_sorting_one(spread: float, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(2)
    centre = torch.rand(6, 200, generator=generator)
    centre[:, :20] = centre[:, :20].round()
    delta = spread * torch.randn(6, 200, generator=generator)
    near = project_l1(delta, centre, epsilon, 0.0, 1.0)
    exact = L1Ball(epsilon).project(centre + delta, centre) - centre
    assert bool((near.abs().sum(1) <= epsilon * (1 + 1e-5)).all())
    torch.testing.assert_close(near, exact, rtol=0, atol=2e-3)


def test_kth_largest_counts_from_one() -> None:
    values = torch.tensor([[3.0, 9.0, 1.0], [2.0, 2.0, 7.0]])
    assert kth_largest(values, torch.tensor([1, 2])).flatten().tolist() == [9.0, 2.0]
    assert kth_largest(values, torch.tensor([3, 99])).flatten().tolist() == [1.0, 2.0]
