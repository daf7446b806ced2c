"""APGD against both papers' algorithms written out for one example, with plain loops over steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from robustflat.attacks.apgd_steps import random_start, wider
from robustflat.attacks.autopgd import AutoPgd
from robustflat.attacks.objectives import cross_entropy
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall

PIXELS, COUNT = 40, 4
Measure = Callable[[Tensor], tuple[float, Tensor]]


def network() -> nn.Module:
    """Curved enough that steps often fail to raise the loss."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 24), nn.Tanh(), nn.Linear(24, 4)).double().eval()
    with torch.no_grad():
        model[1].weight.mul_(8)
        model[3].weight.mul_(4)
    return model.requires_grad_(False)


def images() -> Tensor:
    """In the middle of the box, which so plays no part."""
    generator = torch.Generator().manual_seed(0)
    return 0.4 + 0.2 * torch.rand(COUNT, 1, 5, 8, generator=generator, dtype=torch.float64)


class Best(NamedTuple):
    point: Tensor
    grad: Tensor
    value: float


def measure_with(model: nn.Module, y: Tensor) -> Measure:
    def measure(point: Tensor) -> tuple[float, Tensor]:
        point = point.clone().requires_grad_()
        value = nn.functional.cross_entropy(model(point[None]), y)
        value.backward()
        assert point.grad is not None
        return value.item(), point.grad

    return measure


def shrunk(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    """Nearest point of the ball around zero."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    if norm == "l2":
        return delta * min(1.0, epsilon / delta.norm().item())
    low, high = 0.0, delta.abs().max().item()
    if delta.abs().sum() <= epsilon:
        return delta
    for _ in range(60):  # the threshold that leaves epsilon
        middle = (low + high) / 2
        low, high = (middle, high) if (delta.abs() - middle).clamp(min=0).sum() > epsilon else (low, middle)
    return delta.sign() * (delta.abs() - high).clamp(min=0)


def dense(measure: Measure, x: Tensor, start: Tensor, *, epsilon: float, norm: str, steps: int, rho: float) -> Best:
    """Algorithm 1 of the ICML 2020 paper; rises are counted between one evaluation and the next, as released."""
    window, check = 22, 22
    eta, point, before = 2 * epsilon, start, start
    value, grad = measure(start)
    best = Best(start, grad, value)
    rises, halved, best_at_check = 0, True, value
    for step in range(1, steps + 1):
        direction = grad.sign() if norm == "linf" else grad / grad.norm()
        target = x + shrunk(point + eta * direction - x, epsilon, norm)
        if step > 1:
            target = point + 0.75 * (target - point) + 0.25 * (point - before)
            target = x + shrunk(target - x, epsilon, norm)
        before, point = point, target
        last, (value, grad) = value, measure(point)
        rises += value > last
        if value > best.value:
            best = Best(point, grad, value)
        if step == check:
            halved = rises <= rho * window or (not halved and best_at_check == best.value)
            if halved:
                eta, point, grad = eta / 2, best.point, best.grad
            best_at_check, rises = best.value, 0
            window = max(window - 3, 6)
            check += window
    return best


def sparse(measure: Measure, x: Tensor, start: Tensor, *, epsilon: float, steps: int, every: int, fresh: bool) -> Best:
    """l1-APGD of the ICML 2021 paper; `fresh` for a run that begins at noise."""
    eta, point = epsilon, start
    support = float(PIXELS if fresh else (start != x).sum())
    moves = 0.2 * PIXELS if fresh else support / 1.5
    value, grad = measure(start)
    best = Best(start, grad, value)
    for step in range(1, steps + 1):
        count = max(int(moves), 1)
        moving = grad.flatten().abs().topk(count).indices
        direction = torch.zeros(PIXELS, dtype=x.dtype)
        direction[moving] = grad.flatten()[moving].sign() / count
        point = x + shrunk(point + eta * direction.view_as(x) - x, epsilon, "l1")
        value, grad = measure(point)
        if value > best.value:
            best = Best(point, grad, value)
        if step % every == 0:
            now = float((best.point != x).sum())
            moves = now / 1.5
            if now < 0.95 * support:
                eta, point, grad = epsilon, best.point, best.grad
            else:
                eta = max(eta / 1.5, epsilon / 10)
            support = now
    return best


@pytest.mark.parametrize("rho", [0.75, 0.3])
@pytest.mark.parametrize("ball", [LinfBall(0.05), L2Ball(0.3)], ids=lambda ball: ball.norm)
def test_dense_steps_follow_the_algorithm(ball: InputBall, rho: float) -> None:
    model, x = network(), images()
    y = torch.arange(COUNT) % 4
    found = AutoPgd(ball, rho=rho)(model, x, y, generator=torch.Generator().manual_seed(0))
    starts = random_start(ball, x, torch.Generator().manual_seed(0))
    for i in range(COUNT):
        measure = measure_with(model, y[i : i + 1])
        best = dense(measure, x[i], starts[i], epsilon=ball.epsilon, norm=ball.norm, steps=100, rho=rho)
        assert found.value[i].item() == pytest.approx(best.value, rel=1e-5)
        torch.testing.assert_close(found.x_adv[i], best.point, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_sparse_steps_follow_the_algorithm(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exact projection: one off by 1e-5 of epsilon may turn the order of two gradients round.

    The search comes back to points where it was, so which of them is the best may be a matter of rounding.
    """

    def exact(delta: Tensor, centre: Tensor, epsilon: float, low: float, high: float) -> Tensor:
        return torch.stack([shrunk(row, epsilon, "l1") for row in delta])

    monkeypatch.setattr("robustflat.attacks.apgd_steps.project_l1", exact)
    model, x, ball = network(), images(), L1Ball(0.4)
    y = torch.arange(COUNT) % 4
    found = AutoPgd(ball, wide_start=wide)(model, x, y, generator=torch.Generator().manual_seed(0))
    stages = [(3.0, 30), (2.0, 30), (1.0, 40)] if wide else [(1.0, 100)]
    starts = random_start(wider(ball, stages[0][0]), x, torch.Generator().manual_seed(0))
    agreeing = 0
    for i in range(COUNT):
        point, best = starts[i], None
        for factor, steps in stages:
            epsilon = factor * ball.epsilon
            point = point if best is None else x[i] + shrunk(point - x[i], epsilon, "l1")
            best = sparse(
                measure_with(model, y[i : i + 1]),
                x[i],
                point,
                epsilon=epsilon,
                steps=steps,
                every=4,
                fresh=best is None,
            )
            point = best.point
        assert best is not None
        agreeing += bool(((found.x_adv[i] - best.point).abs() < 1e-5).all())
    assert agreeing >= COUNT - 1


def test_the_reported_value_is_that_of_the_point() -> None:
    model, x = network(), images()
    y = torch.arange(COUNT) % 4
    found = AutoPgd(LinfBall(0.05), steps=20)(model, x, y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.value, cross_entropy(model(found.x_adv), y))
