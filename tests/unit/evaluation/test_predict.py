"""Predictions against plain forward passes and a literal loop over restarts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.errors import UserError
from robustflat.evaluation.predict import predict
from robustflat.geometry.input_ball import LinfBall
from robustflat.types import Batch


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 4)
    )


def batches() -> list[Batch]:
    x, y = torch.rand(7, 1, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    return [Batch(x[:4], y[:4]), Batch(x[4:], y[4:])]


def attack(**changes) -> Pgd:
    return Pgd(LinfBall(0.1), steps=3, step_size=0.05, **changes)


def test_clean_logits_are_those_of_eval_mode_in_order() -> None:
    model, data = network().train(), batches()
    before = copy.deepcopy(model)
    found = predict(model, data)
    expected = before.eval()(torch.cat([b.x for b in data])).detach()
    assert torch.allclose(found.logits, expected, atol=1e-6)
    assert torch.equal(found.labels, torch.cat([b.y for b in data]))
    assert (found.logits.dtype, found.logits.device.type) == (torch.float32, "cpu")
    assert not found.logits.requires_grad
    assert model.training
    for one, other in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_robust_logits_are_those_of_the_attacks_images() -> None:
    model, data = network().eval(), batches()
    found = predict(model, data, attack=attack(), generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    expected = [model(attack()(model, b.x, b.y, generator=draws).x_adv).detach() for b in data]
    assert torch.allclose(found.logits, torch.cat(expected), atol=1e-6)
    clean = predict(model, data)
    losses = [F.cross_entropy(p.logits, p.labels, reduction="none") for p in (found, clean)]
    assert bool((losses[0] >= losses[1]).all())
    assert float(losses[0].mean()) > float(losses[1].mean())


def test_of_several_restarts_the_highest_cross_entropy_counts_per_example() -> None:
    model, data = network().eval(), batches()[:1]
    found = predict(model, data, attack=attack(), restarts=3, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(1)
    runs = [model(attack()(model, data[0].x, data[0].y, generator=draws).x_adv).detach() for _ in range(3)]
    losses = torch.stack([F.cross_entropy(z, data[0].y, reduction="none") for z in runs])
    assert torch.allclose(F.cross_entropy(found.logits, data[0].y, reduction="none"), losses.amax(dim=0), atol=1e-6)
    assert len(losses.argmax(dim=0).unique()) > 1


def test_no_attack_gives_the_clean_logits() -> None:
    model, data = network(), batches()
    assert torch.equal(predict(model, data, attack=NoAttack()).logits, predict(model, data).logits)


def test_a_double_precision_model_answers_in_float32() -> None:
    model = network().double()
    data = [Batch(b.x.double(), b.y) for b in batches()]
    assert predict(model, data).logits.dtype == torch.float32


class Constant(nn.Module):
    def __init__(self, value: float, classes: int = 3) -> None:
        super().__init__()
        self.value, self.classes = value, classes

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), self.classes), self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UserError, match="logits are not finite for 7 of 7 examples, first for example 0"):
        predict(Constant(value, 4), batches())


def test_unusable_calls_are_refused() -> None:
    with pytest.raises(UserError, match=r"The model has 3 classes .*, but a label is 3"):
        predict(Constant(0.0), batches())
    with pytest.raises(UserError, match="nothing to predict"):
        predict(Constant(0.0), [])
    with pytest.raises(UserError, match="one class per image"):
        predict(Constant(0.0), [Batch(torch.rand(2, 1, 2, 2), torch.full((2, 3), 1 / 3))])
    with pytest.raises(UserError, match="restarts must lie in"):
        predict(Constant(0.0), batches(), restarts=0)
