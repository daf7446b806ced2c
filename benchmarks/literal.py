"""The measured work as one would write it first, in the style of common scripts: what our code is timed against.

The network as it is, weight gradients computed in every attack by `backward()`, one `.item()` per example and step, one
perturbation at a time with a deep copy of the network each. Random draws are those of our code, so that the values
found can be compared.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.subjects import EPSILON, STEP
from robustflat.flatness.worst import WorstFlatness
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.models.modes import perturbable
from robustflat.types import Weights


def literal_pgd(model: nn.Module, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) with the highest loss of `steps` + 1 iterates."""
    delta = LinfBall(EPSILON).sample(x, generator) - x
    best, best_loss = delta.clone(), [-float("inf")] * len(x)
    for step in range(steps + 1):
        delta = delta.detach().requires_grad_()
        loss = F.cross_entropy(model(x + delta), y, reduction="none")
        for i in range(len(x)):
            if loss[i].item() > best_loss[i]:
                best_loss[i] = loss[i].item()
                best[i] = delta[i].detach()
        model.zero_grad()
        loss.sum().backward()
        assert delta.grad is not None
        if step < steps:
            delta = (delta.detach() + STEP * delta.grad.sign()).clamp(-EPSILON, EPSILON)
            delta = (x + delta).clamp(0, 1) - x
    return x + best


def moved_copy(model: nn.Module, nu: Weights) -> nn.Module:
    """A copy of a network at w + nu."""
    moved = copy.deepcopy(model)
    for name, parameter in moved.named_parameters():
        if name in nu:
            parameter.data += nu[name]
    return moved


def losses_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (B,)."""
    return F.cross_entropy(model(x), y, reduction="none").detach()


def literal_point(
    model: nn.Module, nu: Weights, x: Tensor, y: Tensor, *, steps: int, generator: torch.Generator
) -> Tensor:
    """Robust losses (B,) at w + nu; clean ones with 0 steps."""
    moved = moved_copy(model, nu)
    return losses_at(moved, literal_pgd(moved, x, y, steps, generator) if steps else x, y)


def literal_ascent(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, generator: torch.Generator) -> Tensor:
    """Losses (B,) at the best point of one joint ascent in weights and images (worst-case flatness)."""
    weights = {name: w.detach() for name, w in perturbable(model).items()}
    ball, stride = WeightBall(0.003), WeightBall(0.001)
    nu = ball.sample(weights, generator, sampling=WorstFlatness().protocol.worst_start)
    delta = LinfBall(EPSILON).sample(x, generator) - x
    best, best_loss = (nu, delta), -float("inf")
    for _ in range(steps + 1):
        moved = moved_copy(model, nu)
        delta = delta.detach().requires_grad_()
        loss = F.cross_entropy(moved(x + delta), y)
        if loss.item() > best_loss:
            best, best_loss = (nu, delta.detach()), loss.item()
        loss.backward()
        grads = {n: p.grad for n, p in moved.named_parameters() if n in nu and p.grad is not None}
        step = stride.steepest(grads, weights)
        nu = ball.project({name: nu[name] + step[name] for name in nu}, weights)
        assert delta.grad is not None
        delta = (delta.detach() + STEP * delta.grad.sign()).clamp(-EPSILON, EPSILON)
        delta = (x + delta).clamp(0, 1) - x
    return losses_at(moved_copy(model, best[0]), x + best[1], y)
