"""The two decisions of a gradient search: where it goes next, and which of its iterates it keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustflat.attacks.judging import choose, improves, select
from robustflat.geometry.input_ball import InputBall
from robustflat.types import Found


class Walk:
    """Projected steps with momentum that, with `shrink`, takes back steps that did harm, per example.

    Args:
        ball: the allowed images around each x.
        x: centres (B, C, H, W).
        step_size: length of a step in the ball's norm.
        momentum: share of the old direction in the new one.
        shrink: factor of an example's step size after a step that lowered its value; `None` accepts all steps.
        l1_sparsity: share of the coordinates that a step in an L1 ball moves; `None`: the ball's `steepest`.
    """

    def __init__(
        self,
        ball: InputBall,
        x: Tensor,
        *,
        step_size: float,
        momentum: float = 0.0,
        shrink: float | None = None,
        l1_sparsity: float | None = None,
    ) -> None:
        self.ball = ball
        self.x = x
        self._project = ball.onto(x)
        self.step_size = step_size
        self.momentum = momentum
        self.shrink = shrink
        self.l1_sparsity = l1_sparsity
        self._velocity: Tensor | None = None
        self._at: tuple[Found, Tensor] | None = None
        self._lengths: Tensor | None = None  # (B, 1, 1, 1), with backtracking

    @torch.no_grad()
    def onward(self, new: Found, grad: Tensor) -> Tensor:
        """The next point to evaluate, given the last one and the gradient of its value, (B, C, H, W)."""
        if self.shrink is not None:
            new, grad = self._take_back(new, grad, self.shrink)
        if self.l1_sparsity is None:
            direction = self.ball.steepest(grad)
        else:
            direction = sparse_direction(self.ball, new.x_adv, grad, self.l1_sparsity)
        if self.momentum > 0:
            old = torch.zeros_like(direction) if self._velocity is None else self._velocity
            direction = self._velocity = self.momentum * old + (1 - self.momentum) * direction
        length = self.step_size if self._lengths is None else self._lengths
        return self._project(new.x_adv + length * direction)

    def _take_back(self, new: Found, grad: Tensor, factor: float) -> tuple[Found, Tensor]:
        if self._at is None or self._lengths is None:
            self._lengths = torch.full_like(self.x[:, :1, :1, :1], self.step_size)
        else:
            old, old_grad = self._at
            accepted = new.value >= old.value
            new, grad = select(accepted, new, old), choose(accepted, grad, old_grad)
            self._lengths = choose(accepted, self._lengths, self._lengths * factor)
        self._at = new, grad
        return new, grad


class Keeper:
    """Keeps one iterate per example by a rule of `judging.KEEP`; the earlier one among equals."""

    def __init__(self, keep: str) -> None:
        self.keep = keep
        self._kept: Found | None = None

    def see(self, new: Found) -> None:
        """Take note of an iterate."""
        self._kept = new if self._kept is None else select(improves(new, self._kept, self.keep), new, self._kept)

    def kept(self) -> Found:
        """The iterates kept so far, of the at least one seen."""
        assert self._kept is not None
        return self._kept


class EarlyStopper:
    """PGD-tau: keeps fooled iterates better than those before, tau + 1 at most, else the clean image.

    Args:
        clean: the clean images, judged.
        tau: how many better ones may follow the first fooled iterate, >= 0.
    """

    def __init__(self, clean: Found, tau: int) -> None:
        self._clean = clean
        self._stored = clean._replace(value=torch.full_like(clean.value, -torch.inf))
        self._left = torch.full_like(clean.fooled, tau + 1, dtype=torch.int64)

    def see(self, new: Found) -> None:
        """Take note of an iterate."""
        take = new.fooled & (new.value > self._stored.value) & (self._left > 0)
        self._stored = select(take, new, self._stored)
        self._left = self._left - take.long()

    def kept(self) -> Found:
        """The last iterate stored, or the clean image where there is none."""
        return select(self._stored.value == -torch.inf, self._clean, self._stored)


def sparse_direction(ball: InputBall, point: Tensor, grad: Tensor, share: float) -> Tensor:
    """Direction of L1 norm 1 along the largest gradient entries that have room in the box; zero stays zero.

    A step in proportion to the gradient is what concentrates, after projection onto the L1 ball, on the largest
    entries (equal steps would keep the k entries equal for ever); passing over blocked entries is what lets it
    go on once the largest ones have reached black or white. Sparse steps: Tramer and Boneh, NeurIPS 2019.

    Args:
        ball: for the ends of the box.
        point: current images (B, C, H, W).
        grad: gradient there, same shape.
        share: share of the entries that move, in (0, 1], rounded up.
    """
    has_room = torch.where(grad > 0, point < ball.high, point > ball.low)
    size = torch.where(has_room, grad.abs(), 0).flatten(1)
    moved = size.topk(math.ceil(share * size.shape[1]), dim=1)
    largest = moved.values[:, :1].clamp_min(torch.finfo(grad.dtype).tiny)
    weights = moved.values / largest  # at most 1, so that gradients of any magnitude can be summed
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)
    return torch.zeros_like(size).scatter(1, moved.indices, weights).view_as(grad) * grad.sign()
