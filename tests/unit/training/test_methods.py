"""One optimizer step of each training method, float64, against a slow version written from its formula."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import NoAttack, Pgd
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.gradients.entropy_sgd import EntropySgd
from robustflat.gradients.random_weights import RandomWeights
from robustflat.gradients.sam import Sam
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.mart import Mart
from robustflat.losses.rotation import Rotation
from robustflat.losses.trades import Trades
from robustflat.models.classifier import Classifier
from robustflat.rng import Streams
from robustflat.training.callbacks import ClipWeights, WeightAverage
from robustflat.types import Batch, Found
from tests.unit.training.slow_methods import (
    EPSILON,
    PERTURBED,
    STEP,
    STEPS,
    Batches,
    Weights,
    attacked,
    average_of,
    cross_entropy,
    everything,
    gradient_at,
    hidden,
    kl,
    moved,
    network,
    per_layer_step,
    probabilities,
    require_equal,
    slow_attack,
    stepped,
    trainable,
    trained,
)


@pytest.fixture
def start() -> tuple[Weights, list[str], Batch]:
    """Weights and buffers, names of the trainable ones, and the first batch."""
    model = network()
    return everything(model), list(trainable(model)), Batches().batches[0]


# The methods.


def test_standard_training(start):
    w, names, batch = start
    expected = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, *batch)))
    require_equal(trained(attack=NoAttack()), expected)


def test_adversarial_training_updates_weights_and_statistics(start):
    w, names, batch = start
    x_adv = attacked(w, batch)
    trainer = trained()
    require_equal(trainer, stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, x_adv, batch.y))))
    h = F.conv2d(x_adv, w["body.0.weight"], w["body.0.bias"])
    layer = trainer.model.body[1]
    mean = 0.9 * w["body.1.running_mean"] + 0.1 * h.mean(dim=(0, 2, 3))
    var = 0.9 * w["body.1.running_var"] + 0.1 * h.var(dim=(0, 2, 3), unbiased=True)
    torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.running_var, var, rtol=0, atol=1e-10)
    assert layer.num_batches_tracked == 1


def test_half_adversarial_training_weighs_every_example_alike(start):
    w, names, batch = start
    mixed = torch.cat([batch.x[:3], attacked(w, Batch(batch.x[3:], batch.y[3:]))])
    expected = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, mixed, batch.y)))
    require_equal(trained(wrappers={"half": partial(Fraction, fraction=0.5)}), expected)


def test_preventing_label_leaking_attacks_the_predicted_label(start):
    w, names, batch = start
    predicted = probabilities(w, batch.x, training=False).argmax(dim=1)
    assert not torch.equal(predicted, batch.y)
    x_adv = attacked(w, Batch(batch.x, predicted))
    expected = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, x_adv, batch.y)))
    require_equal(trained(wrappers={"predicted": PredictedLabels}), expected)


def test_ignoring_incorrect_leaves_wrong_images_clean(start):
    w, names, batch = start
    right = probabilities(w, batch.x, training=False).argmax(dim=1) == batch.y
    assert 0 < right.sum() < len(right)
    x_adv = torch.where(right[:, None, None, None], attacked(w, batch), batch.x)
    expected = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, x_adv, batch.y)))
    require_equal(trained(wrappers={"only": OnlyCorrect}), expected)


def test_early_stopped_attack_leaves_examples_clean_that_it_never_fools(start):
    w, names, batch = start
    kept, point, fooled = batch.x.clone(), batch.x, torch.zeros(6, dtype=torch.bool)
    for step in range(STEPS + 1):
        wrong = probabilities(w, point, training=False).argmax(dim=1) != batch.y
        for i in range(6):  # tau = 0: the first fooled iterate is kept
            if wrong[i] and not fooled[i]:
                kept[i], fooled[i] = point[i], True
        if step < STEPS:
            point = point.detach().requires_grad_()
            (g,) = torch.autograd.grad(cross_entropy(w, point, batch.y, training=False), point)
            point = point.detach() + STEP * g.sign()
            point = torch.minimum(torch.maximum(point, batch.x - EPSILON), batch.x + EPSILON).clamp(0, 1)
    expected = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, kept, batch.y)))
    attack = Pgd(LinfBall(EPSILON), steps=STEPS, step_size=STEP, random_start=False, tau=0)
    require_equal(trained(attack=attack), expected)


@pytest.mark.parametrize("target", ["paper", "uniform"])
def test_label_smoothing(start, target):
    w, names, batch = start
    tau, x_adv = 0.3, attacked(w, batch)

    def loss(v: Weights) -> Tensor:
        p, total = probabilities(v, x_adv), 0.0
        for i in range(6):
            for k in range(3):
                if target == "paper":
                    share = 1 - tau if k == batch.y[i] else tau / 2
                else:
                    share = tau / 3 + (1 - tau if k == batch.y[i] else 0.0)
                total = total - share * p[i, k].log() / 6
        return total

    options = CrossEntropy(label_smoothing=tau, label_smoothing_target=target)
    require_equal(trained(loss=options), stepped(w, gradient_at(w, names, loss)))


def test_label_noise(start):
    w, names, batch = start
    x_adv, generator = attacked(w, batch), Streams(1)["loss"]
    drawn = torch.randint(3, (6,), generator=generator)
    y = torch.where(torch.rand(6, generator=generator) < 0.5, drawn, batch.y)
    assert not torch.equal(y, batch.y)
    expected = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, x_adv, y)))
    require_equal(trained(loss=CrossEntropy(label_noise=0.5), seed=1), expected)


class Fixed:
    """An attack that answers with prepared images."""

    def __init__(self, x_adv: Tensor) -> None:
        self.x_adv = x_adv

    def __call__(self, forward, x, y, objective=None, generator=None):
        return Found(self.x_adv, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool))


def noised(x: Tensor) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    return (x + 0.2 * (noise - 0.5)).clamp(0, 1)


def trades_loss(w: Weights, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    return cross_entropy(w, x, y) + beta * kl(probabilities(w, x), probabilities(w, x_adv)) / len(x)


def test_trades(start):
    w, names, batch = start
    x_adv = noised(batch.x)
    expected = stepped(w, gradient_at(w, names, lambda v: trades_loss(v, batch.x, x_adv, batch.y, 6.0)))
    require_equal(trained(loss=Trades(beta=6.0), attack=Fixed(x_adv)), expected)


def test_mart(start):
    w, names, batch = start
    x_adv = noised(batch.x)

    def loss(v: Weights) -> Tensor:
        p, q, total = probabilities(v, batch.x), probabilities(v, x_adv), 0.0
        for i in range(6):
            y = int(batch.y[i])
            strongest = max(q[i, k] for k in range(3) if k != y)
            total = total - q[i, y].log() - (1.0001 - strongest).log() + 5.0 * kl(p[i], q[i]) * (1 - p[i, y])
        return total / 6

    require_equal(trained(loss=Mart(beta=5.0), attack=Fixed(x_adv)), stepped(w, gradient_at(w, names, loss)))


def test_adversarial_weights_take_the_gradient_at_the_perturbed_weights(start):
    w, names, batch = start
    x_adv = attacked(w, batch)
    loss = lambda v: cross_entropy(v, x_adv, batch.y)  # noqa: E731
    nu = per_layer_step(w, gradient_at(w, names, loss), 0.05)
    expected = stepped(w, gradient_at(moved(w, nu), names, loss))
    require_equal(trained(gradient=AdversarialWeights(WeightBall(0.05))), expected)


def test_several_ascent_steps_stay_in_the_ball(start):
    w, names, batch = start
    x_adv, radius, length = attacked(w, batch), 0.05, 0.04
    loss = lambda v: cross_entropy(v, x_adv, batch.y)  # noqa: E731
    nu = {name: torch.zeros_like(w[name]) for name in PERTURBED}
    for _ in range(3):
        step = per_layer_step(w, gradient_at(moved(w, nu), names, loss), length)
        nu = moved(nu, step)
        nu = {n: v * min(1.0, float(radius * w[n].norm() / v.norm())) for n, v in nu.items()}
    expected = stepped(w, gradient_at(moved(w, nu), names, loss))
    require_equal(trained(gradient=AdversarialWeights(WeightBall(radius), steps=3, step_size=length)), expected)


def test_trades_with_adversarial_weights(start):
    w, names, batch = start
    x_adv = noised(batch.x)
    loss = lambda v: trades_loss(v, batch.x, x_adv, batch.y, 6.0)  # noqa: E731
    nu = per_layer_step(w, gradient_at(w, names, loss), 0.02)
    expected = stepped(w, gradient_at(moved(w, nu), names, loss))
    rule = AdversarialWeights(WeightBall(0.02))
    require_equal(trained(loss=Trades(beta=6.0), attack=Fixed(x_adv), gradient=rule), expected)


def test_sharpness_aware_minimisation_moves_all_weights_by_one_length(start):
    w, names, batch = start
    x_adv = attacked(w, batch)
    loss = lambda v: cross_entropy(v, x_adv, batch.y)  # noqa: E731
    g = gradient_at(w, names, loss)
    length = math.sqrt(sum(float((slope**2).sum()) for slope in g.values()))
    expected = stepped(w, gradient_at(moved(w, g, 0.2 / length), names, loss))
    require_equal(trained(gradient=Sam(rho=0.2)), expected)


def test_random_weights_average_the_gradient_over_draws(start):
    w, names, batch = start
    x_adv, generator = attacked(w, batch), Streams(0)["weights"]
    loss = lambda v: cross_entropy(v, x_adv, batch.y)  # noqa: E731
    mean = {name: torch.zeros_like(w[name]) for name in names}
    for _ in range(2):
        drawn = {n: torch.randn(w[n].shape, generator=generator, dtype=torch.float64) for n in PERTURBED}
        nu = {n: 0.05 * w[n].norm() * v / v.norm() for n, v in drawn.items()}
        mean = moved(mean, gradient_at(moved(w, nu), names, loss), 0.5)
    require_equal(trained(gradient=RandomWeights(WeightBall(0.05), population=2)), stepped(w, mean))


def test_entropy_sgd_walks_and_steps_towards_the_mean(start):
    w, names, _ = start
    model = network()  # only its running statistics are used below: attacks of the second walk need them
    inner, gamma, noise, decay, averaging = 0.1, 0.5, 0.02, 0.003, 0.75
    generator = Streams(0)["weights"]
    walker, mu = dict(w), {name: w[name] for name in names}
    for batch in Batches().batches[:2]:
        x_adv = attacked(walker, batch)
        g = gradient_at(walker, names, lambda v, x=x_adv, y=batch.y: cross_entropy(v, x, y))
        h = F.conv2d(x_adv, walker["body.0.weight"], walker["body.0.bias"])
        walker["body.1.running_mean"] = 0.9 * walker["body.1.running_mean"] + 0.1 * h.mean(dim=(0, 2, 3))
        walker["body.1.running_var"] = 0.9 * walker["body.1.running_var"] + 0.1 * h.var(dim=(0, 2, 3))
        for n in names:
            d = g[n] + decay * walker[n] - gamma * (w[n] - walker[n])
            d = d + noise / math.sqrt(0.5 * inner) * torch.randn(w[n].shape, generator=generator, dtype=torch.float64)
            walker[n] = walker[n] - inner * d
            mu[n] = averaging * mu[n] + (1 - averaging) * walker[n]
    expected = stepped(w, {n: w[n] - mu[n] for n in names})
    rule = EntropySgd(inner_steps=2, inner_lr=inner, gamma=gamma, noise=noise, averaging=averaging, weight_decay=decay)
    require_equal(trained(model, gradient=rule), expected)


def test_rotation_self_supervision():
    model = network(auxiliary=True)
    head = model.auxiliary
    nn.init.normal_(head.norm.running_mean)
    w, names, batch = everything(model), list(trainable(model)), Batches().batches[0]
    turns = torch.randint(4, (3,), generator=Streams(0)["attack"])
    x = batch.x.clone()
    for i, turn in enumerate(turns.tolist()):
        x[2 * i + 1] = batch.x[2 * i + 1].rot90(turn, dims=(1, 2))

    def turn_loss(v: Weights, x: Tensor, rows: list[int], *, training: bool) -> Tensor:
        h = (hidden(v, x, training=training) @ v["auxiliary.hidden.weight"].T + v["auxiliary.hidden.bias"]).relu()
        mean = h.mean(dim=0) if training else v["auxiliary.norm.running_mean"]
        var = h.var(dim=0, unbiased=False) if training else v["auxiliary.norm.running_var"]
        h = (h - mean) / (var + 1e-5).sqrt() * v["auxiliary.norm.weight"] + v["auxiliary.norm.bias"]
        z = h @ v["auxiliary.logits.weight"].T + v["auxiliary.logits.bias"]
        return sum(z[r].logsumexp(0) - z[r, int(t)] for r, t in zip(rows, turns, strict=True)) / 3

    x_adv = torch.empty_like(x)
    x_adv[0::2] = attacked(w, Batch(x[0::2], batch.y[0::2]))
    x_adv[1::2] = slow_attack(w, x[1::2], lambda point: turn_loss(w, point, [0, 1, 2], training=False))

    def loss(v: Weights) -> Tensor:
        p = probabilities(v, x_adv)
        supervised = sum(-p[i, int(batch.y[i])].log() for i in (0, 2, 4)) / 3
        return supervised + 2.0 * turn_loss(v, x_adv, [1, 3, 5], training=True)

    expected = stepped(w, gradient_at(w, names, loss))
    require_equal(trained(network_like(model), loss=Rotation(weight=2.0)), expected)


def network_like(model: Classifier) -> Classifier:
    copy = network(auxiliary=True)
    copy.load_state_dict(model.state_dict())
    return copy


def test_weight_averaging_and_clipping_follow_the_step(start):
    w, names, batch = start
    x_adv = attacked(w, batch)
    new = stepped(w, gradient_at(w, names, lambda v: cross_entropy(v, x_adv, batch.y)))
    average = WeightAverage(decay=0.8)
    averaged = average_of(trained(callbacks={"average": average}), average)
    for n in names:
        torch.testing.assert_close(averaged[n], 0.8 * w[n] + 0.2 * new[n], rtol=0, atol=1e-10)
    clip = ClipWeights(maximum=10.0)
    require_equal(trained(callbacks={"clip": clip}), {n: new[n].clamp(-10, 10) for n in names})
