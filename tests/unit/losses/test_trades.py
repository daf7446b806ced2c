"""TRADES and MART against slow definitions, and their batch-norm statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustflat.attacks.objectives import kl_divergence
from robustflat.errors import UserError
from robustflat.losses.mart import Mart
from robustflat.losses.trades import Trades
from robustflat.types import AdvBatch, Batch


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()


def crafted() -> AdvBatch:
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    return AdvBatch(x, x_adv, torch.tensor([0, 1, 2, 0, 1, 2]))


def rows(logits: torch.Tensor) -> list[list[float]]:
    return logits.softmax(dim=1).tolist()


def test_trades_is_clean_cross_entropy_plus_beta_times_the_divergence():
    model, batch = network(), crafted()
    terms = Trades(beta=3.0)(model, batch)
    clean, robust = 0.0, 0.0
    for p, q, y in zip(rows(model(batch.x)), rows(model(batch.x_adv)), batch.y.tolist(), strict=True):
        clean -= math.log(p[y]) / 6
        robust += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    assert terms.total.item() == pytest.approx(clean + 3 * robust, abs=1e-12)
    assert terms.parts["clean_loss"].item() == pytest.approx(clean, abs=1e-12)
    assert terms.parts["divergence"].item() == pytest.approx(robust, abs=1e-12)
    assert {"loss", "error", "clean_error"} <= terms.parts.keys()


def test_trades_gradient_flows_through_both_predictions():
    torch.manual_seed(1)
    logits = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1])

    class TwoPasses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits[int(x[0, 0, 0, 0])]

    zero, one = torch.zeros(5, 1, 1, 1), torch.ones(5, 1, 1, 1)
    loss = lambda: Trades(beta=2.0)(TwoPasses(), AdvBatch(zero, one, y)).total  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(), logits)
    for index in [(0, 1, 2), (1, 3, 0)]:
        with torch.no_grad():
            logits[index] += 1e-6
            above = loss().item()
            logits[index] -= 2e-6
            below = loss().item()
            logits[index] += 1e-6
        assert gradient[index].item() == pytest.approx((above - below) / 2e-6, abs=1e-8)


def test_trades_with_certain_predictions_stays_finite():
    logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)

    class Flipping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits if x.sum() == 0 else -logits

    batch = AdvBatch(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([0]))
    total = Trades()(Flipping(), batch).total
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_two_passes_update_statistics_twice_and_a_joint_pass_once():
    batch = crafted()
    separate, joint = network(), network()
    joint.load_state_dict(separate.state_dict())
    Trades()(separate, batch)
    Trades(joint_forward=True)(joint, batch)
    assert separate[1].num_batches_tracked.item() == 2
    assert joint[1].num_batches_tracked.item() == 1
    both = separate[0](torch.cat([batch.x, batch.x_adv]))
    expected = 0.1 * both.mean(dim=(0, 2, 3))
    torch.testing.assert_close(joint[1].running_mean, expected)


def test_joint_and_separate_passes_agree_in_eval_mode():
    model, batch = network().eval(), crafted()
    values = [Trades(joint_forward=joint)(model, batch).total.item() for joint in (False, True)]
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_trades_attack_gets_the_clean_prediction_per_example():
    model, batch = network().eval(), crafted()
    objective, y = Trades().objective(model, Batch(batch.x, batch.y))
    assert objective is kl_divergence
    torch.testing.assert_close(y, model(batch.x).softmax(dim=1))
    assert not y.requires_grad


def test_mart_equals_its_formula():
    model, batch = network(), crafted()
    terms = Mart(beta=5.0)(model, batch)
    total = 0.0
    for p, q, y in zip(rows(model(batch.x)), rows(model(batch.x_adv)), batch.y.tolist(), strict=True):
        strongest = max(q[k] for k in range(3) if k != y)
        boosted = -math.log(q[y]) - math.log(1.0001 - strongest)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += (boosted + 5 * divergence * (1 - p[y])) / 6
    assert terms.total.item() == pytest.approx(total, abs=1e-12)


def test_mart_with_certain_mistakes_has_finite_gradient():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits

    image = torch.zeros(1, 1, 1, 1)
    Mart()(Fixed(), AdvBatch(image, image, torch.tensor([1]))).total.backward()
    assert torch.isfinite(logits.grad).all()


def test_mart_refuses_mixed_labels():
    batch = crafted()._replace(y=torch.full((6, 3), 1 / 3))
    with pytest.raises(UserError, match="MART needs one class per image"):
        Mart()(network(), batch)


@pytest.mark.parametrize("loss", [Trades, Mart])
def test_negative_beta_is_refused(loss):
    with pytest.raises(UserError, match=r"beta must lie in \[0, inf\), got -1"):
        loss(beta=-1)
