"""Minimum-norm attack against the distance to a plane, and its projections against a numerical optimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from robustflat.attacks.fmn import Fmn, within
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.errors import UserError
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall

WEIGHT = torch.randn(2, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
BALLS: dict[str, tuple[InputBall, float]] = {
    "linf": (LinfBall(1.0), 1),
    "l2": (L2Ball(100.0), 2),
    "l1": (L1Ball(100.0), math.inf),
}


def forward(x: Tensor) -> Tensor:
    return (x.flatten(1) - 0.5) @ WEIGHT.T  # the boundary passes through the middle of the box


def images(size: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 0.45 + 0.1 * torch.rand(size, 1, 3, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("norm", BALLS)
def test_the_nearest_image_is_at_the_distance_of_the_plane(norm: str) -> None:
    ball, dual = BALLS[norm]
    x = images()
    y = forward(x).argmax(1)
    found = Fmn(ball, steps=100)(forward, x, y)
    distance = -margin(forward(x), y) / torch.linalg.vector_norm(WEIGHT[0] - WEIGHT[1], ord=dual)
    assert found.fooled.all()
    ratio = ball.size(found.x_adv, x) / distance
    assert (ratio >= 1 - 1e-9).all()
    assert (ratio < 1.01).all()


def test_only_images_within_epsilon_count_as_found() -> None:
    x = images()
    y = forward(x).argmax(1)
    distance = -margin(forward(x), y) / (WEIGHT[0] - WEIGHT[1]).abs().sum()
    epsilon = float(distance.median())
    ball = LinfBall(epsilon)
    found = Fmn(ball, steps=50)(forward, x, y)
    clear = (distance / epsilon - 1).abs() > 0.01
    assert torch.equal(found.fooled[clear], distance[clear] < epsilon)
    assert found.fooled.any()
    assert (~found.fooled).any()
    assert (ball.size(found.x_adv, x) <= epsilon).all()
    assert (found.value >= margin(forward(x), y)).all()


def test_a_misclassified_image_comes_back_unchanged() -> None:
    x = images()
    y = forward(x).argmin(1)
    found = Fmn(LinfBall(0.5), steps=5)(forward, x, y)
    assert torch.equal(found.x_adv, x)
    assert found.fooled.all()


def test_logits_that_are_not_numbers_are_no_success() -> None:
    x = images(60)
    x = x[margin(forward(x), forward(x).argmax(1)) < -0.1]
    y = forward(x).argmax(1)

    def with_a_gap(v: Tensor) -> Tensor:
        """Not a number close to the boundary, where the search first crosses it."""
        logits = forward(v)
        return logits.masked_fill((margin(logits, y).abs() < 0.1).unsqueeze(1), torch.nan)

    found = Fmn(LinfBall(0.5), steps=20)(with_a_gap, x, y)
    assert len(x) > 10
    assert torch.equal(found.fooled, margin(with_a_gap(found.x_adv), y) > 0)


def test_the_objective_of_the_call_values_but_does_not_steer() -> None:
    x = images()
    y = forward(x).argmax(1)
    one = Fmn(LinfBall(1.0), steps=20)(forward, x, y)
    other = Fmn(LinfBall(1.0), steps=20)(forward, x, y, cross_entropy)
    assert torch.equal(one.x_adv, other.x_adv)
    torch.testing.assert_close(other.value, cross_entropy(forward(other.x_adv), y))


@pytest.mark.parametrize(("norm", "order"), [("linf", math.inf), ("l2", 2), ("l1", 1)])
def test_projection_has_the_radius_of_each_example_and_beats_other_points(norm: str, order: float) -> None:
    delta = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    radius = torch.tensor([0.3, 1e9, 0.0], dtype=torch.float64)
    nearest = within(delta, radius, norm)
    size = torch.linalg.vector_norm(nearest.flatten(1), ord=order, dim=1)
    assert size[0].item() == pytest.approx(0.3)
    assert torch.equal(nearest[1], delta[1])
    assert nearest[2].abs().max() == 0
    others = torch.randn(5000, 6, dtype=torch.float64)
    others *= (
        0.3
        * torch.rand(5000, 1, dtype=torch.float64)
        / torch.linalg.vector_norm(others, ord=order, dim=1, keepdim=True)
    )
    # Nearest point of a convex set: no other point of it lies at an acute angle.
    residual = (delta[0] - nearest[0]).flatten()
    assert ((others - nearest[0].flatten()) @ residual).max() <= 1e-12


@pytest.mark.parametrize("norm", BALLS)
def test_an_infinite_radius_changes_nothing(norm: str) -> None:
    delta = torch.randn(2, 1, 2, 2)
    assert torch.equal(within(delta, torch.full((2,), torch.inf), norm), delta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must lie in \[1, inf\)"),
        ({"step_size": 0.0}, r"step_size must lie in \(0, inf\)"),
        ({"final_step_size": -1.0}, r"final_step_size must lie in \(0, inf\)"),
        ({"gamma": 1.0}, r"gamma must lie in \(0, 1\)"),
        ({"final_gamma": 0.0}, r"final_gamma must lie in \(0, 1\)"),
        ({"objective": "cw"}, "objective must be one of"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Fmn(LinfBall(0.1), **options)
