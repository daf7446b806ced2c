"""MultiTargeted against one targeted search per class, run by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflat.attacks.multi_targeted import MultiTargeted
from robustflat.attacks.objectives import cross_entropy, margin
from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall

BALL = LinfBall(0.1)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)


def forward(x: Tensor) -> Tensor:
    return x.flatten(1) @ WEIGHT.T


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(40, 1, 2, 3, generator=generator, dtype=torch.float64)
    return x, forward(x).argmax(1)


def test_all_targets_together_find_the_optimum_of_a_linear_model() -> None:
    """max_t of (w_t - w_y) x + epsilon * ||w_t - w_y||_1: a search on the margin itself follows one t only."""
    x, y = images()
    inner = Pgd(BALL, steps=4, step_size=0.05, random_start=False)
    found = MultiTargeted(inner)(forward, x, y)
    for i in range(len(x)):
        options = [
            float((WEIGHT[t] - WEIGHT[y[i]]) @ x[i].flatten() + 0.1 * (WEIGHT[t] - WEIGHT[y[i]]).abs().sum())
            for t in range(4)
            if t != y[i]
        ]
        assert found.value[i].item() == pytest.approx(max(options))
        assert found.fooled[i].item() == (max(options) > 0)
    one_way = Pgd(BALL, steps=4, step_size=0.05, random_start=False, objective="margin")(forward, x, y)
    assert (found.value > one_way.value + 1e-6).any()
    assert (found.value >= one_way.value - 1e-9).all()


def test_fewer_targets_mean_the_most_likely_ones() -> None:
    x, y = images()
    inner = Pgd(BALL, steps=4, step_size=0.05, random_start=False)
    found = MultiTargeted(inner, targets=1)(forward, x, y)
    second = forward(x).topk(2, dim=1).indices[:, 1]
    direction = (WEIGHT[second] - WEIGHT[y]).sign().view_as(x)
    torch.testing.assert_close(found.x_adv, x + 0.1 * direction)


def test_the_objective_of_the_call_judges_the_result() -> None:
    x, y = images()
    inner = Pgd(BALL, steps=4, step_size=0.05, random_start=False)
    by_margin = MultiTargeted(inner)(forward, x, y)
    by_loss = MultiTargeted(inner)(forward, x, y, cross_entropy)
    assert torch.equal(by_margin.x_adv, by_loss.x_adv)
    assert torch.equal(by_loss.value, cross_entropy(forward(by_loss.x_adv), y))
    assert torch.equal(by_margin.value, margin(forward(by_loss.x_adv), y))


def test_bad_arguments_are_refused_by_name() -> None:
    inner = Pgd(BALL, steps=1, step_size=0.05)
    with pytest.raises(UserError, match=r"targets must lie in \[1, inf\), got 0"):
        MultiTargeted(inner, targets=0)
    with pytest.raises(UserError, match="objective must be one of dlr_targeted, margin_to_target, got 'dlr'"):
        MultiTargeted(inner, objective="dlr")
    with pytest.raises(UserError, match="attack with targeted=False"):
        MultiTargeted(Pgd(BALL, steps=1, step_size=0.05, targeted=True))
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        MultiTargeted(inner)(lambda x: x.flatten(1)[:, :1], torch.rand(2, 1, 2, 2), torch.zeros(2).long())
