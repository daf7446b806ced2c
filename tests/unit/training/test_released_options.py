"""Options that do what the paper's released code does, each against a slow version or another library, float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.errors import UserError
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.gradients.clipped import ClippedEntries
from robustflat.gradients.plain import Plain
from robustflat.losses.trades import Trades, mean_divergence
from robustflat.models.classifier import rotation_head
from robustflat.rng import Streams
from robustflat.training.callbacks import Callback, ClipWeights, WeightAverage
from robustflat.training.optimizers import adam, sgd
from robustflat.training.schedules import cyclic
from robustflat.types import Batch
from tests.unit.training.slow_methods import (
    DECAY,
    EPSILON,
    LR,
    PERTURBED,
    STEP,
    STEPS,
    Batches,
    attacked,
    average_of,
    cross_entropy,
    everything,
    gradient_at,
    kl,
    moved,
    network,
    per_layer_step,
    probabilities,
    require_equal,
    stepped,
    trainable,
    trained,
)


class TwoPerEpoch(Batches):
    def __len__(self) -> int:
        return 2


SIMPLE_SGD = partial(sgd, lr=LR, momentum=0.0, nesterov=False, weight_decay=DECAY)


# Gradients clipped entry by entry.


def test_clipped_entries_are_those_of_the_gradient():
    model = network()
    w, names, batch = everything(model), list(trainable(model)), Batches().batches[0]
    x_adv = attacked(w, batch)
    g = gradient_at(w, names, lambda v: cross_entropy(v, x_adv, batch.y))
    clipped = {name: value.clamp(-0.01, 0.01) for name, value in g.items()}
    assert any((value.abs() > 0.01).any() for value in g.values())
    require_equal(trained(gradient=ClippedEntries(Plain(), maximum=0.01)), stepped(w, clipped))


def test_clipping_goes_around_any_rule():
    model = network()
    w, names, batch = everything(model), list(trainable(model)), Batches().batches[0]
    x_adv = attacked(w, batch)
    loss = lambda v: cross_entropy(v, x_adv, batch.y)  # noqa: E731
    nu = per_layer_step(w, gradient_at(w, names, loss), 0.05)
    clipped = {n: g.clamp(-0.01, 0.01) for n, g in gradient_at(moved(w, nu), names, loss).items()}
    rule = ClippedEntries(AdversarialWeights(WeightBall(0.05), warmup_epochs=0), maximum=0.01)
    require_equal(trained(gradient=rule), stepped(w, clipped))
    assert nu.keys() == set(PERTURBED)


def test_clipping_tells_the_rule_inside_how_far_training_is():
    slow = trained(gradient=ClippedEntries(AdversarialWeights(WeightBall(0.5), warmup_epochs=1), maximum=1e9))
    assert torch.equal(everything(slow.model)["head.weight"], everything(trained().model)["head.weight"])


def test_clipping_refuses_gradients_of_another_batch():
    model = network()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(UserError, match="zero_grad"):
        ClippedEntries(Plain())(model, lambda: None, lambda batch: None)
    with pytest.raises(UserError, match="maximum must lie in"):
        ClippedEntries(Plain(), maximum=0)


# Weights clipped between the attack and the scoring.


def test_weights_are_attacked_unclipped_and_scored_clipped():
    limit, model = 0.2, network()
    w, names = everything(model), list(trainable(model))
    assert max(w[n].abs().max() for n in names) > limit
    for batch in Batches().batches[:2]:
        x_adv = attacked(w, batch)  # at the weights that the last step left
        w = {n: v.clamp(-limit, limit) if n in names else v for n, v in w.items()}
        h = torch.nn.functional.conv2d(x_adv, w["body.0.weight"], w["body.0.bias"])
        g = gradient_at(w, names, lambda v, x=x_adv, y=batch.y: cross_entropy(v, x, y))
        w["body.1.running_mean"] = 0.9 * w["body.1.running_mean"] + 0.1 * h.mean(dim=(0, 2, 3))
        w["body.1.running_var"] = 0.9 * w["body.1.running_var"] + 0.1 * h.var(dim=(0, 2, 3))
        w |= {n: w[n] - LR * (g[n] + DECAY * w[n]) for n in names}
    expected = {n: w[n].clamp(-limit, limit) for n in names}  # what is evaluated and saved is clipped
    clip = ClipWeights(maximum=limit, norm_layers=True, timing="before_scoring")
    trainer = trained(data=TwoPerEpoch(), make_optimizer=SIMPLE_SGD, callbacks={"clip": clip})
    require_equal(trainer, expected)


def test_another_timing_is_refused():
    with pytest.raises(UserError, match="timing must be one of"):
        ClipWeights(maximum=1.0, timing="never")


# The weight average.


class Remember(Callback):
    def __init__(self) -> None:
        self.states = []

    def on_fit_start(self, trainer):
        self.after_step(trainer)

    def after_step(self, trainer):
        self.states.append(everything(trainer.model))


def test_copied_statistics_and_the_extra_update_per_epoch():
    tau, remember = 0.7, Remember()
    average = WeightAverage(decay=tau, batch_norm="copy", twice_per_epoch=True)
    callbacks = {"remember": remember, "average": average}
    trainer = trained(data=TwoPerEpoch(), epochs=2, callbacks=callbacks, make_optimizer=SIMPLE_SGD)
    w0, w1, w2, w3, w4 = remember.states
    found = average_of(trainer, average)
    for name in trainable(trainer.model):
        expected = w0[name]
        for w in (w1, w2, w2, w3, w4):  # once more between the epochs
            expected = tau * expected + (1 - tau) * w[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10)
    for name in ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"):
        assert torch.equal(found[name], w4[name])


# Momentum that falls where the learning rate rises.


@pytest.mark.parametrize("cycles", [1, 3])
def test_momentum_cycles_as_torch_cycles_it(cycles):
    half = 15
    groups = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05, momentum=0.9) for _ in range(2)]
    ours = cyclic(groups[0], 2 * half * cycles, peak=0.2, cycles=cycles, momentum_at_peak=0.8)
    theirs = torch.optim.lr_scheduler.CyclicLR(
        groups[1], base_lr=0.0, max_lr=0.2, step_size_up=half, base_momentum=0.8, max_momentum=0.9
    )
    for _ in range(2 * half * cycles):
        for key in ("lr", "momentum"):
            assert groups[0].param_groups[0][key] == pytest.approx(groups[1].param_groups[0][key])
        for optimizer, schedule in zip(groups, (ours, theirs), strict=True):
            optimizer.step()
            schedule.step()


def test_momentum_of_an_optimizer_without_it_cannot_cycle():
    with pytest.raises(UserError, match="optimizer=sgd"):
        cyclic(adam(nn.Linear(1, 1)), 10, momentum_at_peak=0.8)
    with pytest.raises(UserError, match="momentum_at_peak must lie in"):
        cyclic(sgd(nn.Linear(1, 1)), 10, momentum_at_peak=1.0)


# TRADES whose attack keeps one iterate for the whole batch.


def test_trades_attack_that_chooses_for_the_batch():
    model = network()
    w, names, batch = everything(model), list(trainable(model)), Batches().batches[0]
    p = probabilities(w, batch.x, training=False)
    attack = Pgd(LinfBall(EPSILON), steps=STEPS, step_size=STEP)
    points, point = [], attack.ball.sample(batch.x, Streams(0)["attack"])
    for step in range(STEPS + 1):
        points.append(point)
        if step < STEPS:
            point = point.detach().requires_grad_()
            (g,) = torch.autograd.grad(kl(p, probabilities(w, point, training=False)), point)
            point = point.detach() + STEP * g.sign()
            point = torch.minimum(torch.maximum(point, batch.x - EPSILON), batch.x + EPSILON).clamp(0, 1)
    values = [float(kl(p, probabilities(w, x, training=False))) for x in points]
    x_adv = points[max(range(len(points)), key=lambda i: values[i])].detach()

    def loss(v):
        return cross_entropy(v, batch.x, batch.y) + 6 * kl(probabilities(v, batch.x), probabilities(v, x_adv)) / 6

    found = trained(loss=Trades(beta=6.0, best_iterate="per_batch"), attack=attack)
    require_equal(found, stepped(w, gradient_at(w, names, loss)))


def test_the_batch_objective_gives_every_example_the_mean():
    logits, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64).softmax(dim=1)
    expected = kl(y, logits.softmax(dim=1)) / 5
    torch.testing.assert_close(mean_divergence(logits, y), expected.expand(5))
    with pytest.raises(UserError, match="best_iterate"):
        Trades(best_iterate="none")
    objective, _ = Trades(best_iterate="per_batch").objective(network(), Batch(torch.rand(2, 1, 4, 4).double(), y[:2]))
    assert objective is mean_divergence


# The rotation head behind a clamp.


def test_the_clamped_head_sees_features_between_0_and_1():
    torch.manual_seed(0)
    head, features = rotation_head(5, clamp=True).eval(), 3 * torch.randn(7, 5)
    open_head = rotation_head(5).eval()
    open_head.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(features), open_head(features.clamp(0, 1)))
    assert not torch.allclose(head(features), open_head(features))
