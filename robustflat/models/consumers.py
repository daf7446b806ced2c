"""What becomes of the output of a layer inside a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustflat.models.modes import evaluating, frozen


@torch.no_grad()
def alone(network: nn.Module, example: Tensor, pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether the outputs of layers go into the layers named beside them and nowhere else, such as around a block.

    Whether logits stay the same cannot tell: the batch norm of an untrained network does next to nothing, and one of
    scale 0 hides what goes around it. So the outputs are made not-a-number and what follows is made finite: whatever
    else takes an output hands that on.

    Args:
        network: images -> logits; left as found.
        example: a few images (B, C, H, W) that it takes.
        pairs: paths of a layer and of the normalisation that takes its output.
    """
    handles = []
    for layer, norm in ((network.get_submodule(first), network.get_submodule(second)) for first, second in pairs):
        handles.append(layer.register_forward_hook(lambda module, taken, given: torch.full_like(given, torch.nan)))
        handles.append(norm.register_forward_hook(lambda module, taken, given: module.forward(torch.zeros_like(given))))
    try:
        with frozen(network), evaluating(network):
            return not bool(network(example).isnan().any())
    finally:
        for handle in handles:
            handle.remove()
