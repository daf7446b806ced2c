"""How Auto-PGD moves and adapts: with momentum and halved steps in L-infinity and L2, sparsely in L1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustflat.attacks.duals import kth_largest, project_l1
from robustflat.attacks.hunt import Pack
from robustflat.attacks.judging import choose
from robustflat.geometry.input_ball import InputBall
from robustflat.geometry.numerics import normal, positive, uniform

MOMENTUM = 0.75
"""Weight of the new step; the last movement counts with the rest."""

_FIRST_SHARE = 0.2
_SPARSER = 1.5
_LONGEST_TO_SHORTEST = 10.0


@dataclass
class Ascent(Pack):
    """State of an ascent, one row per example: where it is, where it was best, and how it has been going."""

    turn: Tensor  # which of the runs side by side, from 0
    previous: Tensor
    point: Tensor
    grad: Tensor
    value: Tensor
    best_point: Tensor
    best_grad: Tensor
    best_value: Tensor
    step: Tensor  # (B, 1)
    rises: Tensor  # steps since the last check that raised the value
    best_at_check: Tensor
    halved: Tensor  # whether the last check changed the step
    moves: Tensor  # L1: number of pixels that a step moves, rounded down
    support: Tensor  # L1: number of pixels changed at the best point, at the last check

    def arrive(self, point: Tensor, value: Tensor, grad: Tensor | None) -> None:
        """Take note of the value and gradient at a new point; `None`: the last point, which needs none."""
        better = value > self.best_value
        shape = (-1, *[1] * (point.ndim - 1))
        self.best_point = choose(better, point, self.best_point)
        self.best_value = torch.where(better, value, self.best_value)
        if grad is not None:
            self.best_grad = torch.where(better.view(shape), grad, self.best_grad)
            self.grad = grad
        self.rises = self.rises + (value > self.value)
        self.previous, self.point, self.value = self.point, point, value

    def go_back(self, which: Tensor) -> None:
        """Continue from the best point, for the examples `which`, bool (B,)."""
        which = which.view(-1, *[1] * (self.point.ndim - 1))
        self.point = torch.where(which, self.best_point, self.point)
        self.grad = torch.where(which, self.best_grad, self.grad)


class Steps(Protocol):
    """The geometry of one run."""

    ball: InputBall
    first_step: float

    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Bring a point into ball and box around x."""
        ...

    def onward(self, run: Ascent) -> Tensor:
        """The next point."""
        ...

    def adapt(self, run: Ascent, done: int) -> None:
        """Change step sizes after `done` steps, if a check is due."""
        ...


class DenseSteps:
    """Steps of all pixels, for L-infinity and L2 (ICML 2020, Algorithm 1).

    Args:
        ball: the allowed images.
        steps: length of the run, which fixes the checks.
        rho: share of raising steps up to which a step is halved.
    """

    def __init__(self, ball: InputBall, *, steps: int, rho: float) -> None:
        self.ball = ball
        self.first_step = 2 * ball.epsilon
        self.rho = rho
        self.checks = checks(steps)

    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Ball, then box: for these norms the box only brings points closer to x. Accurate up to rounding."""
        ball = self.ball
        if ball.norm == "linf":
            near = torch.clamp(point, x - ball.epsilon, x + ball.epsilon)
        else:
            delta = (point - x).flatten(1)
            size = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
            near = x + (delta * (ball.epsilon / positive(size)).clamp_max(1)).view_as(x)
        return near.clamp_(ball.low, ball.high)

    def onward(self, run: Ascent) -> Tensor:
        """Gradient step, projected; then 3/4 of it and 1/4 of the last movement, projected again."""
        step = run.step.view(-1, *[1] * (run.point.ndim - 1))
        target = self.project(torch.addcmul(run.point, step, self.ball.steepest(run.grad)), run.x)
        if run.previous is run.point:  # the first step
            return target
        moved = (target - run.point).mul_(MOMENTUM).add_(run.point - run.previous, alpha=1 - MOMENTUM)
        return self.project(moved.add_(run.point), run.x)

    def adapt(self, run: Ascent, done: int) -> None:
        """Halve the step and go back to the best point where too few steps raised the value, or nothing moved."""
        window = self.checks.get(done)
        if window is None:
            return
        struggles = run.rises <= self.rho * window
        stuck = ~run.halved & (run.best_at_check >= run.best_value)
        run.halved = struggles | stuck
        run.step = run.step * (1 - 0.5 * run.halved.to(run.step.dtype)).unsqueeze(1)
        run.best_at_check = run.best_value
        run.rises = torch.zeros_like(run.rises)
        run.go_back(run.halved)


class SparseSteps:
    """Steps of the pixels with the largest gradients, for L1 (ICML 2021, Section 3).

    Args:
        ball: the allowed images.
        every: steps between two checks.
    """

    def __init__(self, ball: InputBall, *, every: int) -> None:
        self.ball = ball
        self.first_step = ball.epsilon
        self.every = every

    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """Nearest point of ball and box together, which in L1 is another than first ball, then box."""
        ball, centre = self.ball, x.flatten(1)
        delta = project_l1(point.flatten(1) - centre, centre, ball.epsilon, ball.low, ball.high)
        return (centre + delta).clamp_(ball.low, ball.high).view_as(x)

    def onward(self, run: Ascent) -> Tensor:
        """Equal steps, of L1 norm `step` together, of the share of pixels with the largest gradients."""
        flat = run.grad.flatten(1)
        size = flat.abs()
        count = run.moves.clamp(1, size.shape[1])
        large = torch.ge(size, kth_largest(size, count), out=torch.empty_like(size))
        direction = flat.sign().mul_(large)
        moving = direction.abs().sum(dim=1, keepdim=True).clamp_min(1)
        return self.project(run.point + (direction * (run.step / moving)).view_as(run.point), run.x)

    def adapt(self, run: Ascent, done: int) -> None:
        """Follow the sparsity of the best point; shorter steps while it stays, fresh ones when it has fallen."""
        if done % self.every:
            return
        support = changed_pixels(run.best_point, run.x)
        sparser = support < 0.95 * run.support
        run.moves = support / _SPARSER
        shorter = (run.step / _SPARSER).clamp_min(self.first_step / _LONGEST_TO_SHORTEST)
        run.step = torch.where(sparser.unsqueeze(1), self.first_step, shorter)
        run.support = support
        run.go_back(sparser)


def checks(steps: int) -> dict[int, int]:
    """Number of steps done -> length of the window checked there: 22 %, then 3 % less each time down to 6 %."""
    first, least, less = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    at, window, result = 0, first, {}
    while at + window <= steps:
        at += window
        result[at] = window
        window = max(window - less, least)
    return result


def changed_pixels(point: Tensor, x: Tensor) -> Tensor:
    """Number of pixel values that differ, (B,), in the images' type."""
    return (point != x).flatten(1).to(point.dtype).sum(dim=1)


def random_start(ball: InputBall, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Where a run begins: uniform in the cube, on the L2 sphere, or a Gaussian brought into the L1 ball."""
    if ball.norm == "linf":
        noise = (2 * uniform(x.shape, x, generator) - 1) * ball.epsilon
        return (x + noise.to(x.dtype)).clamp(ball.low, ball.high)
    noise = normal(x.shape, x, generator).to(x.dtype)
    if ball.norm == "l2":
        size = torch.linalg.vector_norm(noise.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
        return (x + noise * (ball.epsilon / positive(size))).clamp(ball.low, ball.high)
    return ball.project(x + noise, x)


def random_starts(
    ball: InputBall, x: Tensor, turns: int, generator: torch.Generator | None
) -> tuple[Tensor, list[Tensor]]:
    """Starts of runs side by side, x holding the images of all, and the generator's state after each's draws."""
    starts, states = [], []
    for part in x.chunk(turns):
        starts.append(random_start(ball, part, generator))
        if generator is not None and turns > 1:
            states.append(generator.get_state())
    return torch.cat(starts), states


def wider(ball: InputBall, factor: float) -> InputBall:
    """Ball of the same kind with `factor` times the radius (L-infinity: at most the whole box)."""
    epsilon = ball.epsilon * factor
    if ball.norm == "linf":
        epsilon = min(epsilon, ball.high - ball.low)
    return type(ball)(epsilon, ball.low, ball.high)


def depart(
    point: Tensor, *, x: Tensor, y: Tensor, rows: Tensor, value: Tensor, grad: Tensor, first_step: float
) -> Ascent:
    """State at the start of a run at `point`, with its value and gradient."""
    pixels = float(x[0].numel())
    support = changed_pixels(point, x)
    return Ascent(
        turn=torch.zeros_like(rows),
        rows=rows,
        x=x,
        y=y,
        caught=point,
        fooled=torch.zeros_like(value, dtype=torch.bool),
        previous=point,
        point=point,
        grad=grad,
        value=value,
        best_point=point,
        best_grad=grad,
        best_value=value,
        step=torch.full_like(x.flatten(1)[:, :1], first_step),
        rises=torch.zeros_like(value),
        best_at_check=value,
        halved=torch.ones_like(value, dtype=torch.bool),
        moves=torch.full_like(support, _FIRST_SHARE * pixels),
        support=torch.full_like(support, pixels),
    )


def follow_sparsity(run: Ascent) -> None:
    """Begin with the sparsity that the point has, where it comes from an earlier run and not from noise."""
    run.support = changed_pixels(run.point, run.x)
    run.moves = run.support / _SPARSER
