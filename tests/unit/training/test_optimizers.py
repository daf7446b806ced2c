"""Optimizer builders: parameter groups, update rules written out, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.training.optimizers import adam, adamw, sgd


def model_with_gradient() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 2)).double()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def test_sgd_takes_nesterov_steps_with_decay():
    model = model_with_gradient()
    made = sgd(model, lr=0.1, momentum=0.5, weight_decay=0.01)
    w = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in w]
    for _ in range(3):
        made.step()
        for i, p in enumerate(model.parameters()):
            d = p.grad + 0.01 * w[i]
            velocity[i] = 0.5 * velocity[i] + d if _ else d
            w[i] = w[i] - 0.1 * (d + 0.5 * velocity[i])
    for p, expected in zip(model.parameters(), w, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_adam_adds_decay_to_the_gradient_and_adamw_to_the_step():
    for build, decoupled in ((adam, False), (adamw, True)):
        model = model_with_gradient()
        w = [p.detach().clone() for p in model.parameters()]
        build(model, lr=0.1, weight_decay=0.01).step()
        for p, before in zip(model.parameters(), w, strict=True):
            g = p.grad if decoupled else p.grad + 0.01 * before
            kept = before * (1 - 0.1 * 0.01) if decoupled else before
            expected = kept - 0.1 * g / (g.abs() + 1e-8)
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [sgd, adam, adamw])
def test_norms_and_biases_are_left_out_of_decay_on_request(build):
    model = model_with_gradient()
    made = build(model, lr=0.1, weight_decay=0.02, decay_norm_and_bias=False)
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    named = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert named == {
        "0.weight": 0.02,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.02,
        "2.bias": 0.0,
    }
    assert len(build(model, lr=0.1).param_groups) == 1


def test_frozen_parameters_are_left_out():
    model = model_with_gradient()
    model[0].requires_grad_(False)
    made = sgd(model)
    assert sum(len(group["params"]) for group in made.param_groups) == 4


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="no trainable parameters"):
        sgd(nn.ReLU())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(sgd, lr=0), r"lr must lie in \(0, inf\), got 0"),
        (partial(sgd, momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (partial(sgd, momentum=0.0), "nesterov needs momentum > 0"),
        (partial(sgd, weight_decay=-1), "weight_decay must lie in"),
        (partial(adam, betas=(0.9, 1.0)), "betas must lie in"),
        (partial(adamw, betas=(0.9,)), "betas must be two numbers"),
        (partial(adam, eps=0.0), "eps must lie in"),
    ],
)
def test_values_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build(model_with_gradient())


def test_plain_sgd_without_momentum_is_possible():
    assert sgd(model_with_gradient(), momentum=0.0, nesterov=False).defaults["momentum"] == 0
