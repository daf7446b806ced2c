"""ReLU layers that overwrite their input, in copies of networks where nobody else reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit, that rewriting may make: rounding, and no more."""


def rectify_in_place_(
    network: nn.Module, logits_of: Callable[[Tensor], Tensor], example: Tensor, leaves: Sequence[Tensor] = ()
) -> None:
    """Let ReLU layers overwrite their input where that changes neither logits nor what autograd can do.

    Args:
        network: a private copy that holds the layers.
        logits_of: how it is called on images like `example`, in eval mode.
        example: a few images.
        leaves: what is differentiated with respect to besides the images.
    """
    rectifiers = [m for m in network.modules() if type(m) is nn.ReLU and not m.inplace]
    with _without_zeros([*network.parameters(), *leaves]):
        with torch.no_grad():
            before = logits_of(example)
        for rectifier in rectifiers:
            rectifier.inplace = True
        try:
            with torch.no_grad():
                fine = close(logits_of(example), before, TOLERANCE)
            with torch.enable_grad():
                point = example.detach().clone().requires_grad_()
                logits = logits_of(point)
                if logits.requires_grad:
                    torch.autograd.grad(logits.sum(), [point, *leaves], allow_unused=True)
        except RuntimeError:  # autograd needs the input of one of them
            fine = False
    for rectifier in rectifiers:
        rectifier.inplace = fine


@contextmanager
def _without_zeros(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Weights that are all zero are ones inside: a branch of scale 0 would hide what happens in it."""
    zeros = [t.data for t in tensors if not bool(t.any())]
    for t in zeros:
        t.fill_(1)
    try:
        yield
    finally:
        for t in zeros:
            t.zero_()


def close(logits: Tensor, plain: Tensor, tolerance: float) -> bool:
    """Whether logits differ by at most `tolerance` of the largest of the plain ones."""
    difference = (logits.double() - plain.double()).abs().max()
    return bool(difference <= tolerance * plain.double().abs().max().clamp_min(1e-6))
