"""A small network with batch norm in float64, a crafted batch, and what a rule must leave as it found it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.losses.base import TrainingLoss
from robustflat.types import AdvBatch, LossTerms


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model.train()


def crafted(seed: int) -> AdvBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=generator)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    return AdvBatch(x, (x + 0.1 * noise).clamp(0, 1), torch.randint(3, (6,), generator=generator))


def scoring(model: nn.Module, loss: TrainingLoss) -> Callable[[AdvBatch], LossTerms]:
    return lambda batch: loss(model, batch)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def gradient_at(weights: dict[str, Tensor], loss: TrainingLoss, batch: AdvBatch) -> dict[str, Tensor]:
    """Gradient of the total loss by one plain backward pass of a fresh network that has these weights."""
    model = network()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    model.zero_grad()
    loss(model, batch).total.backward()
    return gradients_of(model)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
