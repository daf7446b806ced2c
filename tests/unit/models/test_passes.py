"""Passes are counted as they were made, copies included, and nothing else changes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.geometry.input_ball import LinfBall
from robustflat.models.inference import rewrite
from robustflat.models.passes import PassCounter, Passes


class Pair(nn.Module):
    """Two outputs of one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.layer(x)
        return found[:, :2], found[:, 2:]


def test_forward_and_backward_passes_and_images():
    model, counter = nn.Linear(3, 2), PassCounter()
    with counter.counting(model):
        model(torch.zeros(5, 3)).sum().backward()
        with torch.no_grad():
            model(torch.zeros(7, 3))
    model(torch.zeros(9, 3))
    assert counter.passes == Passes(forwards=2, backwards=1, images=12)
    assert counter.passes.since(Passes(1, 1, 5)) == Passes(1, 0, 7)


def test_a_pass_with_two_outputs_goes_back_once_whichever_is_used():
    model, counter = Pair(), PassCounter()
    with counter.counting(model):
        one, other = model(torch.zeros(2, 3))
        (one.sum() + other.sum()).backward()
        model(torch.zeros(2, 3))[1].sum().backward()
    assert counter.passes == Passes(2, 2, 4)


def test_copies_and_rewritten_copies_count_into_the_same_book():
    model, counter = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), PassCounter()
    x = torch.rand(6, 1, 2, 2)
    with counter.counting(model):
        copy.deepcopy(model)(x)
        fast = rewrite(model, x[:2])
        assert counter.passes == Passes(1, 0, 6)  # making the fast one is no use of the network
        fast(x)
    assert counter.passes == Passes(2, 0, 12)


def test_the_passes_of_an_attack_and_its_result_is_the_same():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    attack = Pgd(ball=LinfBall(epsilon=0.1), steps=5, step_size=0.03, random_start=False)
    plain = attack(model, x, y)
    counter = PassCounter()
    with counter.counting(model):
        counted = attack(model, x, y)
    assert torch.equal(plain.x_adv, counted.x_adv)
    assert counter.passes.backwards == 5
    assert counter.passes.images == 8 * counter.passes.forwards
    assert not model._forward_hooks
