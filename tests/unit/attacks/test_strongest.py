"""The strongest of several runs, judged by the plain network in full precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.strongest import judged_logits, strength, strongest
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.resnet import resnet_tiny
from robustflat.types import Found


class Scripted:
    """Returns given images one after the other and claims any value."""

    def __init__(self, *runs: Tensor) -> None:
        self.runs = list(runs)

    def __call__(self, forward, x, y, objective=None, generator=None) -> Found:
        return Found(self.runs.pop(0), torch.full((len(x),), 99.0), torch.ones(len(x), dtype=torch.bool))


class Identity(nn.Module):
    """Pixels are logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def as_images(logits: list[list[float]]) -> Tensor:
    return torch.tensor(logits)[:, :, None, None]


def test_highest_cross_entropy_wins_per_example_whatever_the_attack_claims() -> None:
    labels = torch.tensor([0, 1])
    first, second = as_images([[0.9, 0.1], [0.2, 0.3]]), as_images([[0.8, 0.4], [0.1, 0.9]])
    best = strongest(Identity(), first, labels, Scripted(first, second), restarts=2)
    # Example 0 is less sure of 0 in the second run; example 1 of 1 in the first.
    assert torch.equal(best.x_adv, torch.stack([second[0], first[1]]))
    assert torch.equal(best.logits, best.x_adv.flatten(1))


def test_no_run_at_all_is_refused() -> None:
    x = as_images([[0.9, 0.1]])
    with pytest.raises(UserError, match=r"restarts must lie in \[1, inf\), got 0"):
        strongest(Identity(), x, torch.tensor([0]), Scripted(), restarts=0)


def test_ties_keep_the_earlier_run() -> None:
    class Indifferent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 2)

    first, second = as_images([[0.9, 0.1]]), as_images([[0.8, 0.0]])
    best = strongest(Indifferent(), first, torch.tensor([0]), Scripted(first, second), restarts=2)
    assert torch.equal(best.x_adv, first)


def test_the_most_confident_wrong_class_need_not_have_the_highest_cross_entropy() -> None:
    labels = torch.tensor([0])
    # p = (0.3, 0.65, 0.05) is surer of a wrong class; p = (0.2, 0.4, 0.4) has the higher cross-entropy.
    sure = as_images([[math.log(0.3), math.log(0.65), math.log(0.05)]])
    spread = as_images([[math.log(0.2), math.log(0.4), math.log(0.4)]])
    for select, winner in (("cross_entropy", spread), ("confident_wrong", sure)):
        for runs in ((sure, spread), (spread, sure)):
            best = strongest(Identity(), sure, labels, Scripted(*runs), restarts=2, select=select)
            assert torch.equal(best.x_adv, winner)
    assert float(strength(sure.flatten(1), labels, "confident_wrong")) == pytest.approx(0.65)
    with pytest.raises(UserError, match="select must be one of confident_wrong, cross_entropy"):
        strength(sure.flatten(1), labels, "worst")


def test_judging_ignores_autocast_and_train_mode_and_builds_no_graph() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.5)).train()
    x = torch.rand(4, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = judged_logits(model, x)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(logits, model[1](model[0](x)).detach())
    assert model.training
    assert model[2].training


@pytest.mark.parametrize("search", ["plain", "fp32"])
def test_a_memory_budget_changes_neither_images_nor_logits(search: str) -> None:
    torch.manual_seed(0)
    model = resnet_tiny(classes=3, in_channels=1, channels=4).double().eval()
    x, y = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.05)
    whole, parts = (
        strongest(model, x, y, attack, restarts=2, generator=torch.Generator().manual_seed(1), search=search,
                  memory_budget=budget)
        for budget in (None, 0)
    )  # fmt: skip
    torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("search", ["plain", "fp32"])
def test_runs_that_share_a_pass_find_what_runs_one_by_one_find(search: str) -> None:
    model = resnet_tiny(classes=3, in_channels=1, channels=4).double().eval()
    x, y = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    calls: list[int] = []

    class Noting(Pgd):
        def __call__(self, forward, x, *args, **kwargs) -> Found:
            calls.append(len(x))
            return super().__call__(forward, x, *args, **kwargs)

    attack = Noting(LinfBall(0.1), steps=2, step_size=0.05)
    one_by_one, shared = (
        strongest(model, x, y, attack, restarts=5, generator=torch.Generator().manual_seed(1), search=search,
                  at_once=at_once)
        for at_once in (1, 8)
    )  # fmt: skip
    assert calls == [4] * 5 + [8, 8, 4]
    torch.testing.assert_close(shared.x_adv, one_by_one.x_adv, rtol=0, atol=1e-9)
    torch.testing.assert_close(shared.logits, one_by_one.logits, rtol=1e-9, atol=1e-9)
