"""Where one training method is another, what the trainer tells a gradient rule, and resuming."""

from __future__ import annotations

import pytest
import torch

from robustflat.attacks.pgd import NoAttack
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.gradients.entropy_sgd import EntropySgd
from robustflat.gradients.plain import Plain
from robustflat.gradients.random_weights import RandomWeights
from robustflat.losses.rotation import Rotation
from robustflat.losses.trades import Trades
from robustflat.training.callbacks import WeightAverage
from robustflat.types import Batch
from tests.unit.training.slow_methods import (
    DECAY,
    LR,
    MOMENTUM,
    Batches,
    Weights,
    average_of,
    everything,
    network,
    require_equal,
    trainable,
    trained,
)


@pytest.fixture
def start() -> tuple[Weights, list[str], Batch]:
    """Weights and buffers, names of the trainable ones, and the first batch."""
    model = network()
    return everything(model), list(trainable(model)), Batches().batches[0]


# Limits in which one method is another.


def test_adversarial_weights_of_radius_zero_are_adversarial_training():
    plain = trained()
    for statistics in ("perturbed", "unperturbed"):
        rule = AdversarialWeights(WeightBall(0.0), statistics=statistics)
        other = trained(gradient=rule)
        assert all(torch.equal(a, b) for a, b in zip(
            everything(plain.model).values(), everything(other.model).values(), strict=True
        ))  # fmt: skip


def test_trades_with_beta_zero_is_standard_training(start):
    standard = trainable(trained(attack=NoAttack()).model)
    require_equal(trained(loss=Trades(beta=0.0)), standard)


def test_an_average_with_decay_zero_is_the_network():
    average = WeightAverage(decay=0.0)
    trainer = trained(callbacks={"average": average})
    for name, value in average_of(trainer, average).items():
        torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=0, atol=0)


def test_rotation_of_weight_zero_trains_the_classes_of_every_second_image_only():
    trainer = trained(network(auxiliary=True), loss=Rotation(weight=0.0), attack=NoAttack())
    fresh = network(auxiliary=True)
    decayed = {n: p * (1 - LR * (1 + MOMENTUM) * DECAY) for n, p in trainable(fresh).items() if "auxiliary" in n}
    for name, value in decayed.items():
        torch.testing.assert_close(trainable(trainer.model)[name], value, rtol=0, atol=1e-12)


# What the trainer tells a rule, and resuming.


class Noting:
    """The plain gradient, noting what the trainer reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self._plain = Plain()

    def follow(self, *, epoch, step, generator):
        self.seen.append((epoch, step))
        assert isinstance(generator, torch.Generator)

    def __call__(self, model, next_batch, loss):
        return self._plain(model, next_batch, loss)


def test_a_rule_is_told_finished_epochs_and_steps_before_each_step():
    rule = Noting()
    trained(gradient=rule, epochs=3)
    assert rule.seen == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    "make_rule",
    [
        lambda: RandomWeights(WeightBall(0.05), warmup_epochs=1),
        lambda: EntropySgd(noise=0.1, gamma=0.1, gamma_growth=0.5),
        lambda: AdversarialWeights(WeightBall(0.05), warmup_epochs=2),
    ],
    ids=["random", "entropy", "awp"],
)
def test_a_resumed_run_goes_on_bit_for_bit(make_rule):
    whole = trained(gradient=make_rule(), epochs=3)
    first = trained(gradient=make_rule(), epochs=1)
    second = trained(gradient=make_rule(), epochs=3, resumed=first.state_dict())
    for name, value in everything(whole.model).items():
        assert torch.equal(value, second.model.state_dict()[name]), name
