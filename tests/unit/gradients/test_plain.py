"""The plain gradient and micro batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.errors import UserError
from robustflat.gradients.plain import Plain
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.types import AdvBatch


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.rand(6, 1, 2, 2, dtype=torch.float64)
    batch = AdvBatch(x, x, torch.tensor([0, 1, 2, 0, 1, 2]))
    return model, batch, lambda piece: CrossEntropy()(model, piece)


def test_gradient_is_that_of_the_loss_and_weights_stay(problem):
    model, batch, loss = problem
    expected = torch.autograd.grad(loss(batch).total, list(model.parameters()))
    before = [p.clone() for p in model.parameters()]
    parts = Plain()(model, lambda: batch, loss)
    for p, g, w in zip(model.parameters(), expected, before, strict=True):
        assert torch.equal(p.grad, g)
        assert torch.equal(p, w)
    assert parts["loss"].item() == loss(batch).total.item()


def test_micro_batches_add_up_to_the_same_gradient_and_means(problem):
    model, batch, loss = problem
    whole = Plain()(model, lambda: batch, loss)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pieces = Plain(micro_batches=3)(model, lambda: batch, loss)
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-14)
    assert pieces.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name])


@pytest.mark.parametrize("count", [4, 12])
def test_micro_batches_must_divide_the_batch(problem, count):
    model, batch, loss = problem
    with pytest.raises(UserError, match=f"micro_batches must divide the batch size, got {count} for 6 images"):
        Plain(micro_batches=count)(model, lambda: batch, loss)


def test_no_micro_batch_is_refused():
    with pytest.raises(UserError, match="micro_batches must lie in"):
        Plain(micro_batches=0)
