"""Passes through a network piece by piece, so that the memory of one pass is bounded.

Only for networks that treat each image by itself: then pieces change rounding at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from robustflat.models.modes import evaluating, frozen
from robustflat.types import Forward

MEASURED = 2
"""Images on which the memory of a pass is measured."""

# A layer at work holds its output, and in the backward pass two gradients, beside what is kept for later.
_AT_WORK = 3


class InChunks(nn.Module):
    """A network that takes a batch in equal pieces and gives the logits of all.

    The pieces' graphs are all kept where a gradient is asked of the whole; an attack that differentiates piece by
    piece (see `pieces`) needs the memory of one.

    Args:
        network: images (B, C, H, W) -> logits (B, K), each image by itself.
        images: most images of a piece, >= 1.
    """

    def __init__(self, network: nn.Module, images: int) -> None:
        super().__init__()
        self.network, self.images = network, images
        self.training = network.training  # its own flag only

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K)."""
        parts = [self.network(part) for part in _split(x, self.images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def pieces(forward: Forward, *tensors: Tensor) -> Iterator[tuple[Forward, tuple[Tensor, ...]]]:
    """What to call on which part of the batch: one call for all, but for `InChunks`.

    Args:
        forward: the model as an attack was given it.
        tensors: each (B, ...), split alike.
    """
    if not isinstance(forward, InChunks):
        yield forward, tensors
        return
    for parts in zip(*(_split(t, forward.images) for t in tensors), strict=True):
        yield forward.network, parts


def bounded(model: nn.Module, x: Tensor, *, need: float, limit: float) -> nn.Module:
    """The model itself, or in pieces where a pass of all of x and its gradient would not fit the limit.

    The number of pieces is a power of two: what is free varies from moment to moment, and rounding would with it. A
    limit below the need of one image gives pieces of one image. Batch norm without running statistics, which looks at
    the whole batch in eval mode, too, gets the whole batch.

    Args:
        model: images (B, C, H, W) -> logits (B, K), in eval mode.
        x: images (B, C, H, W).
        need: bytes per image, see `bytes_per_image`.
        limit: bytes, see `robustflat.memory.budget_bytes`.
    """
    if need * len(x) <= limit or any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()):
        return model
    fitting = max(int(limit / need), 1)
    count = 2 ** math.ceil(math.log2(len(x) / fitting))
    return InChunks(model, math.ceil(len(x) / count))


def bytes_per_image(model: nn.Module, x: Tensor) -> float:
    """Memory that a pass through a frozen network in eval mode and its input gradient take per image, in bytes.

    Counted in one forward pass of two images: what autograd keeps (each storage once, weights not), and what the
    largest layer needs at work. Libraries' own buffers are not seen. Neither random streams nor hooks of the model
    notice the pass.

    Args:
        model: images (B, C, H, W) -> logits (B, K).
        x: at least one image like those to come.
    """
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad(), frozen(model):
        few = x[:MEASURED].detach().clone()
        with evaluating(model), saved_tensors_hooks(note, lambda tensor: tensor):
            model.forward(few.requires_grad_())  # not model(few): whoever counts passes counts those of the search
    images = few.untyped_storage().nbytes()
    return (sum(kept.values()) + _AT_WORK * max([images, *kept.values()])) / len(few)


def _split(t: Tensor, images: int) -> tuple[Tensor, ...]:
    return t.chunk(math.ceil(len(t) / images)) if len(t) else (t,)
