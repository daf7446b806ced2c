"""Whether two networks compute the same logits and gradients, at weights that hide no difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

_SMALL = 0.01  # weights that a network may grow from

Answer: TypeAlias = tuple[Tensor, ...] | None
"""Logits (B, K) and a gradient (B, C, H, W) where asked; `None` of a network that cannot compute them."""


def answer(network: Callable[[Tensor], Tensor], example: Tensor, *, gradient: bool = True) -> Answer:
    """Logits of images (B, C, H, W), and the gradient of their log-sum-exp."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradient):
        point = example.detach().clone().requires_grad_(gradient)
        try:
            logits = network(point)
            if not gradient:
                return (logits.detach(),)
            (grad,) = torch.autograd.grad(logits.logsumexp(1).sum(), point, allow_unused=True)
        except Exception:  # of the network's code
            return None
    return logits.detach(), torch.zeros_like(point) if grad is None else grad


def fewest(network: Callable[[Tensor], Tensor], example: Tensor) -> Tensor:
    """One image of the example, in the usual order; all of it for a network that takes no single one.

    A single one is what PyTorch (2.14) gets wrong in channels-last order, for some layers.
    """
    one = example[:1].contiguous()
    return example.contiguous() if answer(network, one) is None else one


def alike(one: Answer, other: Answer, tolerance: float) -> bool:
    """Whether both differ by at most `tolerance` of the norm of the first."""
    if one is None or other is None:
        return False
    return all(bool((a - b).norm() <= tolerance * a.norm().clamp_min(1e-30)) for a, b in zip(one, other, strict=True))


@contextmanager
@torch.no_grad()
def moved(network: nn.Module) -> Iterator[None]:
    """Inside, all weights and buffers are others, none of them near 0; afterwards they are as before, bit for bit.

    Weights of 0 hide what they multiply, and those of now that code has looked at them only once.
    """
    before = [(t, t.clone()) for t in (*network.parameters(), *network.buffers()) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, like: Tensor) -> Tensor:
        return torch.rand(shape, generator=generator).to(like)

    try:
        for t, old in before:
            t.mul_(0.75 + draw(*t.shape[:1], *[1] * (t.ndim - 1), like=t) / 2)
            if t.numel() and float(old.abs().max()) < _SMALL:
                # Variances stay positive, and the output of a layer of the size of its input.
                offset = draw(*t.shape, like=t)
                of_weights = (2 * offset - 1) / math.sqrt(t[0].numel() if t.ndim else 1)
                t.add_(of_weights if isinstance(t, nn.Parameter) else offset)
        yield
    finally:
        for t, old in before:
            t.copy_(old)
