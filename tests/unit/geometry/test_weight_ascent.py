"""Ascent steps around fixed weights: to the bit the two operations of the ball they stand for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from robustflat.errors import UserError
from robustflat.geometry.weight_ascent import WeightAscent
from robustflat.geometry.weight_ball import WeightBall


def draws(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (4, 3, 3, 3), "bias": (4,), "linear": (2, 5), "gain": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("norm", "grouping", "relative"),
    [*itertools.product((2.0, math.inf), ("global", "layer", "filter"), (True, False))],
)
def test_a_step_is_steepest_and_projection(norm: float, grouping: str, relative: bool, dtype: torch.dtype) -> None:
    ball, stride = (WeightBall(radius, norm, grouping, relative) for radius in (0.3, 0.1))
    w = draws(0, dtype) | {"new": torch.zeros(3, dtype=dtype)}
    ascent = WeightAscent(ball, 0.1, w)
    ours = theirs = ball.sample(w, torch.Generator().manual_seed(1), surface=False)
    for seed in range(5):
        grad = draws(10 + seed, dtype) | {"new": torch.ones(3, dtype=dtype)}
        if seed == 3:
            grad["bias"] = torch.zeros_like(grad["bias"])
        grad = dict(reversed(grad.items()))
        ours = ascent.onward(ours, grad)
        steps = stride.steepest(grad, w)
        theirs = ball.project({name: theirs[name] + steps[name] for name in w}, w)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in w)


def test_memory_order_is_kept() -> None:
    w = {"conv": draws(0)["conv"].contiguous(memory_format=torch.channels_last)}
    moved = WeightAscent(WeightBall(0.3), 0.1, w).onward(w, w)
    assert moved["conv"].is_contiguous(memory_format=torch.channels_last)


def test_other_names_are_refused() -> None:
    w = draws(0)
    ascent = WeightAscent(WeightBall(0.3), 0.1, w)
    with pytest.raises(UserError, match="bias"):
        ascent.onward(w, {name: t for name, t in w.items() if name != "bias"})
