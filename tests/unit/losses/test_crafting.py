"""How losses craft: the state of the model, the labels, the mode of the attack."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.wrappers import Fraction
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.trades import Trades
from robustflat.types import Batch, Found


class Spy:
    """An attack that notes what it is given, runs the model once, and returns the images shifted a little."""

    def __call__(self, forward, x, y, objective=None, generator=None):
        self.model_itself, self.y, self.objective = isinstance(forward, nn.Module), y, objective
        self.weight_gradients = any(p.requires_grad for p in self.model.parameters())
        self.training = self.model.training
        self.logits = forward(x)
        return Found((x + 0.01).clamp(0, 1), torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool))

    def watch(self, model):
        self.model = model
        return self


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(8, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))


def state_of(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(attack_mode="train"), Trades()])
def test_crafting_leaves_the_model_as_found(loss, batch):
    model = network().train()
    model[1].eval()
    before = state_of(model)
    attack = Pgd(LinfBall(0.1), steps=2, step_size=0.05)
    crafted = loss.craft(model, attack, batch, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model), strict=True))
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not crafted.x_adv.requires_grad
    assert (crafted.x_adv - batch.x).abs().max() > 0.01
    assert crafted.y is batch.y


def test_eval_mode_attacks_with_running_statistics_and_frozen_weights(batch):
    model = network()
    spy = Spy().watch(model)
    CrossEntropy().craft(model, spy, batch)
    assert (spy.training, spy.weight_gradients, spy.model_itself, spy.objective) == (False, False, True, None)
    torch.testing.assert_close(spy.logits, model.eval()(batch.x))


def test_train_mode_attacks_with_batch_statistics_but_keeps_the_running_ones(batch):
    model = network()
    before = state_of(model)
    spy = Spy().watch(model)
    CrossEntropy(attack_mode="train").craft(model, spy, batch)
    assert (spy.training, spy.weight_gradients, spy.model_itself) == (True, False, False)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model), strict=True))
    torch.testing.assert_close(spy.logits, model(batch.x))


def test_attack_sees_true_labels_whatever_the_noise(batch):
    model = network()
    spy = Spy().watch(model)
    crafted = CrossEntropy(label_noise=1.0, label_smoothing=0.5).craft(model, spy, batch)
    assert spy.y is batch.y
    assert crafted.y is batch.y


def test_trades_attack_is_given_the_prediction_of_eval_mode(batch):
    model = network()
    spy = Spy().watch(model)
    crafted = Trades().craft(model, spy, batch)
    torch.testing.assert_close(spy.y, model.eval()(batch.x).softmax(dim=1))
    assert crafted.y is batch.y


def test_trades_attack_on_part_of_the_batch_keeps_the_first_images_clean(batch):
    attack = Fraction(Pgd(LinfBall(0.1), steps=2, step_size=0.05, random_start="uniform"), 0.5)
    crafted = Trades().craft(network(), attack, batch, torch.Generator().manual_seed(0))
    assert torch.equal(crafted.x_adv[:4], batch.x[:4])
    assert (crafted.x_adv[4:] != batch.x[4:]).any()


def test_clean_and_attacked_examples_weigh_by_their_own_share(batch):
    """The released code gives the clean part the weight of the attacked part."""
    model = network().eval()
    attack = Fraction(Pgd(LinfBall(0.3), steps=3, step_size=0.1), 0.25)
    crafted = CrossEntropy().craft(model, attack, batch, torch.Generator().manual_seed(0))
    assert torch.equal(crafted.x_adv[:6], batch.x[:6])
    clean = nn.functional.cross_entropy(model(crafted.x_adv[:6]), batch.y[:6])
    attacked = nn.functional.cross_entropy(model(crafted.x_adv[6:]), batch.y[6:])
    torch.testing.assert_close(CrossEntropy()(model, crafted).total, 0.75 * clean + 0.25 * attacked)
    assert attacked > clean + 0.01


def test_no_attack_costs_no_forward_pass(batch):
    class Uncallable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    crafted = CrossEntropy().craft(Uncallable(), NoAttack(), batch)
    assert crafted.x_adv is batch.x


def test_unknown_attack_mode_is_refused():
    with pytest.raises(UserError, match="attack_mode must be one of eval, train, got 'test'"):
        CrossEntropy(attack_mode="test")
