"""Networks and images that benchmarks work on, and how many operations a forward pass takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustflat.models.resnet import resnet18

EPSILON, STEP = 8 / 255, 0.007
"""L-infinity ball and step of the paper's PGD."""


def made_up(channels: int, count: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A ResNet-18 in eval mode with statistics of made-up images, and those images and labels; time does not mind."""
    torch.manual_seed(0)
    model = resnet18(classes=10, channels=channels, mean=[0.5] * 3, std=[0.25] * 3).to(device)
    x, y = torch.rand(count, 3, 32, 32, device=device), torch.randint(0, 10, (count,), device=device)
    with torch.no_grad():
        model(x)
    return model.eval(), x, y


def counted_gflop(run: Callable[[], object]) -> float:
    """Floating-point operations of convolutions and matrix products in a run, in 1e9; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


@torch.no_grad()
def forward_gflop(model: nn.Module, x: Tensor) -> float:
    """Operations of one forward pass of all images, in 1e9 (F of the counts in the benchmarks)."""
    return counted_gflop(lambda: model(x))
