"""ReLU layers that overwrite their input, in copies of networks where nobody else reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robustflat.models.consumers import overwritable
from robustflat.models.passes import has_hooks


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
    rectifiers = [m for m in network.modules() if type(m) is nn.ReLU and not m.inplace and not has_hooks(m)]
    chosen = overwritable(rectifiers, logits_of, example)
    for rectifier in chosen:
        rectifier.inplace = True
    try:
        with torch.enable_grad():
            point = example.detach().clone().requires_grad_()
            logits = logits_of(point)
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), [point, *leaves], allow_unused=True)
    except RuntimeError:  # autograd needs the input of one of them
        for rectifier in chosen:
            rectifier.inplace = False
