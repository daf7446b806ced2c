"""Every gradient rule leaves weights and statistics as one ordinary scoring would; warm-up; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.gradients.entropy_sgd import EntropySgd
from robustflat.gradients.plain import Plain
from robustflat.gradients.random_weights import RandomWeights
from robustflat.gradients.sam import Sam
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.mart import Mart
from robustflat.losses.trades import Trades
from tests.unit.gradients.problems import crafted, gradients_of, network, same, scoring, statistics_of, weights_of

BALL = WeightBall(0.05)
RULES = {
    "plain": Plain(),
    "awp": AdversarialWeights(BALL),
    "awp of three steps": AdversarialWeights(BALL, steps=3, statistics="unperturbed"),
    "random": RandomWeights(BALL, population=2),
    "sam": Sam(rho=0.1),
    "entropy": EntropySgd(inner_steps=3),
}
LOSSES = {"ce": CrossEntropy(), "trades": Trades(), "mart": Mart()}
PASSES = {"ce": 1, "trades": 2, "mart": 2}
"""Forward passes of one scoring."""


class ScoringError(RuntimeError):
    pass


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", RULES)
def test_weights_and_flags_come_back_bit_for_bit_and_gradients_are_filled(rule, loss):
    model = network()
    before, modes = weights_of(model), [m.training for m in model.modules()]
    seeds = iter(range(10))
    parts = RULES[rule](model, lambda: crafted(next(seeds)), scoring(model, LOSSES[loss]))
    assert same(weights_of(model), before)
    assert all(p.requires_grad and p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert all(not value.requires_grad and value.ndim == 0 for value in parts.values())
    assert {"loss", "error"} <= parts.keys()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", [name for name in RULES if name != "entropy"])
def test_statistics_are_updated_as_by_one_scoring(rule, loss):
    model = network()
    RULES[rule](model, lambda: crafted(0), scoring(model, LOSSES[loss]))
    assert model[1].num_batches_tracked.item() == PASSES[loss]


def test_statistics_are_those_of_the_weights_asked_for():
    plain = network()
    Plain()(plain, lambda: crafted(0), scoring(plain, CrossEntropy()))
    found = {}
    for statistics in ("perturbed", "unperturbed"):
        model = network()
        rule = AdversarialWeights(BALL, statistics=statistics)
        rule(model, lambda: crafted(0), scoring(model, CrossEntropy()))
        found[statistics] = statistics_of(model)
    assert same(found["unperturbed"], statistics_of(plain))
    assert not same(found["perturbed"], statistics_of(plain))


@pytest.mark.parametrize("rule", RULES)
def test_weights_and_statistics_come_back_when_scoring_fails(rule):
    model = network()
    before = weights_of(model)
    tensors = {name: id(b) for name, b in model.named_buffers()}
    calls = 0

    def fail_at_the_end(batch):
        nonlocal calls
        calls += 1
        model(batch.x_adv)
        raise ScoringError

    with pytest.raises(ScoringError):
        RULES[rule](model, lambda: crafted(0), fail_at_the_end)
    assert calls == 1
    assert same(weights_of(model), before)
    assert {name: id(b) for name, b in model.named_buffers()} == tensors


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("entropy", "random")])
def test_gradients_are_added_to_those_already_there(rule):
    first, second = network(), network()
    RULES[rule](first, lambda: crafted(0), scoring(first, CrossEntropy()))
    for p in second.parameters():
        p.grad = torch.ones_like(p)
    RULES[rule](second, lambda: crafted(0), scoring(second, CrossEntropy()))
    for name, g in gradients_of(first).items():
        torch.testing.assert_close(gradients_of(second)[name], g + 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        AdversarialWeights(BALL, warmup_epochs=2),
        RandomWeights(BALL, warmup_epochs=2),
        Sam(rho=0.1, warmup_epochs=2),
    ],
    ids=["awp", "random", "sam"],
)
def test_the_warm_up_is_plain_and_ends(rule):
    def gradient(epoch):
        model = network()
        rule.follow(epoch=epoch, step=0, generator=torch.Generator().manual_seed(0))
        rule(model, lambda: crafted(0), scoring(model, CrossEntropy()))
        return gradients_of(model)

    plain = network()
    Plain()(plain, lambda: crafted(0), scoring(plain, CrossEntropy()))
    assert same(gradient(0), gradients_of(plain))
    assert same(gradient(1), gradients_of(plain))
    assert not same(gradient(2), gradients_of(plain))


def test_ascent_raises_the_loss_and_says_by_how_much():
    model = network()
    at_w = CrossEntropy()(network(), crafted(0)).total
    parts = AdversarialWeights(BALL)(model, lambda: crafted(0), scoring(model, CrossEntropy()))
    assert parts["weight_ascent"] > 0
    torch.testing.assert_close(parts["loss"] - parts["weight_ascent"], at_w.detach(), rtol=0, atol=1e-12)


def test_images_are_crafted_once_per_step_and_once_per_inner_step():
    for rule, count in (
        (AdversarialWeights(BALL, steps=3), 1),
        (RandomWeights(BALL), 1),
        (EntropySgd(inner_steps=3), 3),
    ):
        model, calls = network(), []

        def next_batch(calls=calls):
            calls.append(1)
            return crafted(len(calls))

        rule(model, next_batch, scoring(model, CrossEntropy()))
        assert len(calls) == count


def test_entropy_sgd_without_noise_or_pull_is_a_scaled_gradient():
    model, plain = network(), network()
    rule = EntropySgd(inner_lr=0.1, gamma=0.0, noise=0.0, averaging=0.75, weight_decay=0.0)
    rule(model, lambda: crafted(0), scoring(model, CrossEntropy()))
    Plain()(plain, lambda: crafted(0), scoring(plain, CrossEntropy()))
    for name, g in gradients_of(plain).items():
        torch.testing.assert_close(gradients_of(model)[name], 0.025 * g, rtol=0, atol=1e-12)


def test_gamma_grows_with_the_steps_up_to_its_limit():
    rule = EntropySgd(gamma=1e-4, gamma_growth=1e-3, inner_lr=0.1)
    for step, expected in ((0, 1e-4), (1000, 1e-4 * 1.001**1000), (10**9, 10.0)):
        rule.follow(epoch=0, step=step, generator=torch.Generator())
        assert rule._gamma() == pytest.approx(expected, rel=1e-9)


def test_weights_that_the_loss_does_not_use_stay():
    model = nn.ModuleDict({"used": network(), "spare": nn.Linear(2, 2).double()})
    for rule in (AdversarialWeights(BALL), EntropySgd(noise=0.0, weight_decay=0.0)):
        model.zero_grad()
        rule(model, lambda: crafted(0), lambda batch: CrossEntropy()(model["used"], batch))
        grad = model["spare"].weight.grad
        assert grad is None or not grad.any()


REFUSED = {
    "steps must lie": lambda: AdversarialWeights(BALL, steps=0),
    "step_size must lie": lambda: AdversarialWeights(BALL, step_size=0.0),
    "statistics must be one of": lambda: AdversarialWeights(BALL, statistics="both"),
    "population must lie": lambda: RandomWeights(BALL, population=0),
    "sampling must be one of": lambda: RandomWeights(BALL, sampling="cube"),
    "warmup_epochs must lie": lambda: RandomWeights(BALL, warmup_epochs=-1),
    "rho must lie": lambda: Sam(rho=-0.1),
    "inner_steps must lie": lambda: EntropySgd(inner_steps=0),
    "gamma must lie.*1 / inner_lr": lambda: EntropySgd(gamma=20.0),
    "averaging must lie": lambda: EntropySgd(averaging=1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_values_out_of_range_are_refused(message):
    with pytest.raises(UserError, match=message):
        REFUSED[message]()


def test_a_frozen_model_is_refused():
    for rule, message in ((AdversarialWeights(BALL), "no weights to perturb"), (EntropySgd(), "no trainable weights")):
        model = network().requires_grad_(False)
        with pytest.raises(UserError, match=message):
            rule(model, lambda: crafted(0), scoring(model, CrossEntropy()))
