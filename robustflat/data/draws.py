"""Random numbers for whole batches: drawn where the generator lives, handed over on the images' device."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent draws from U[0, 1), float32 of `shape` on `device`."""
    return _handed_over(torch.rand(shape, generator=generator, device=generator.device), device)


def integers(count: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent uniform draws from 0 .. count - 1, int64 of `shape` on `device`."""
    return _handed_over(torch.randint(count, shape, generator=generator, device=generator.device), device)


def permutation(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniformly random order of 0 .. count - 1, int64 (count,) on `device`."""
    return _handed_over(torch.randperm(count, generator=generator, device=generator.device), device)


def symmetric_beta(alpha: float, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent draws from Beta(alpha, alpha), float32 (count,) on `device`.

    The ratio G1 / (G1 + G2) of two Gamma(alpha) variables has this distribution.
    """
    shape = torch.full((2, count), alpha, dtype=torch.float64, device=generator.device)
    # a small alpha can make both variables underflow: the tiny summand then gives 1/2, not 0/0
    gammas: Tensor = torch._standard_gamma(shape, generator=generator) + torch.finfo(torch.float64).tiny
    return _handed_over((gammas[0] / gammas.sum(0)).float(), device)


def _handed_over(drawn: Tensor, device: torch.device) -> Tensor:
    # A copy to the CPU that nobody waits for would be read before it has arrived.
    return drawn.to(device, non_blocking=device.type != "cpu")
