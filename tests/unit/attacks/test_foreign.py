"""Attacks of other libraries: kept inside ball and box, joined with ours, refused when they return nonsense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.attacks.foreign import Foreign
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.wrappers import WorstOf
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall

BALL = LinfBall(0.1)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 2, 2, generator=generator), torch.arange(6) % 4


def test_a_result_outside_is_brought_into_ball_and_box():
    x, y = examples()
    found = Foreign(lambda model, images, labels: images + 3.0, BALL)(network(), x, y)
    assert torch.allclose(found.x_adv, (x + 0.1).clamp(max=1.0))
    expected = nn.functional.cross_entropy(network()(found.x_adv), y, reduction="none")
    assert torch.allclose(found.value, expected, atol=1e-6)
    assert torch.equal(found.fooled, network()(found.x_adv).argmax(1) != y)


def test_foolbox_joins_ours_in_worst_of():
    foolbox = pytest.importorskip("foolbox")
    model, (x, y) = network(), examples()

    def theirs(net, images, labels):
        wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        return foolbox.attacks.LinfPGD(steps=5)(wrapped, images, labels, epsilons=0.1)[1]

    weak = Pgd(BALL, steps=1, step_size=0.001, random_start=False)
    joined = WorstOf({"ours": weak, "theirs": Foreign(theirs, BALL)})(model, x, y)
    alone = Foreign(theirs, BALL)(model, x, y)
    assert (joined.value >= weak(model, x, y).value - 1e-6).all()
    assert (BALL.size(joined.x_adv, x) <= 0.1).all()
    assert alone.value.mean() > weak(model, x, y).value.mean()


def test_its_random_draws_come_from_our_generator_and_leave_the_global_one_alone():
    x, y = examples()
    attack = Foreign(lambda model, images, labels: images + torch.rand_like(images), BALL)
    model, state = network(), torch.get_rng_state()
    runs = [attack(model, x, y, generator=torch.Generator().manual_seed(s)).x_adv for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())


def test_it_may_take_gradients_in_a_caller_s_inference_mode():
    def step(model, images, labels):
        images.requires_grad_()
        loss = nn.functional.cross_entropy(model(images), labels)
        return images + 0.1 * torch.autograd.grad(loss, images)[0].sign()

    x, y = examples()
    model = network()
    expected = Foreign(step, BALL)(model, x, y)
    with torch.inference_mode():
        found = Foreign(step, BALL)(model, x + 0, y + 0)
    assert torch.equal(found.x_adv, expected.x_adv)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda m, x, y: x[:2], "must return images of shape"),
        (lambda m, x, y: None, "must return images of shape"),
        (lambda m, x, y: x * float("nan"), "not finite"),
    ],
)
def test_nonsense_is_refused(attack, message):
    with pytest.raises(UserError, match=message):
        Foreign(attack, BALL)(network(), *examples())


def test_something_that_cannot_be_called_is_refused():
    with pytest.raises(UserError, match="needs a callable"):
        Foreign(3, BALL)
