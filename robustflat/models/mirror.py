"""A rewritten copy of a network that is still being trained: it takes over the weights whenever it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustflat.models.inference import BatchNorm, InferenceModel, KeptInFloat, Linear, rewrite, scale_and_shift


class Mirror:
    """Follows a network with a copy rewritten for speed (see `inference.rewrite`), whose weights are refreshed.

    Rewriting costs many forward passes, refreshing a few small operations a layer. What is folded into what is
    decided once, from `example`; the algebra of folding holds for whatever weights and statistics come later.

    Args:
        model: images in [0, 1] -> logits; followed, never changed. Its modules must stay the same.
        example: a few images (B, C, H, W) that it takes, on its device.
        double: fold in float64 and round once, as `rewrite` does: its weights to the bit, in three times the time.
        precision: "fp32" or "bf16". The bf16 copy of an untrained network is accepted however far its logits are off.

    Raises:
        UserError: for another precision, or a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, precision: str = "fp32", double: bool = False) -> None:
        self._double = double
        self.copy = _rewritten(model, example, precision)
        norms = {norm for _, norm in self.copy.folds}
        folds = dict(self.copy.folds)
        self._folded: list[tuple[Linear, BatchNorm, Linear]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for path, module in model.named_modules():
            if path in norms:
                continue
            mirrored = _unwrapped(self.copy.network.get_submodule(path))
            if path in folds:
                self._folded.append((module, model.get_submodule(folds[path]), mirrored))  # type: ignore[arg-type]
                continue
            for name, tensor in _own_tensors(module):
                self._pairs.append((getattr(mirrored, name), tensor))

    @torch.no_grad()
    def refreshed(self) -> InferenceModel:
        """The copy with the weights and running statistics that the network has now."""
        for linear, norm, mirrored in self._folded:
            scale, bias = scale_and_shift(norm)
            if linear.bias is not None:
                bias = bias + linear.bias.double() * scale
            assert mirrored.bias is not None
            mirrored.bias.copy_(bias)
            weight = linear.weight.double() if self._double else linear.weight
            scale = scale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))
            mirrored.weight.copy_(weight * scale)
        for target, source in self._pairs:
            target.copy_(source)
        return self.copy


def _rewritten(model: nn.Module, example: Tensor, precision: str) -> InferenceModel:
    """A copy that takes the images: a network that uses `view` may refuse them in channels-last order."""
    try:
        copy = rewrite(model, example, precision=precision, check_half=False)
        with torch.no_grad():
            copy(example)
    except RuntimeError:
        return rewrite(model, example, precision=precision, channels_last=False, check_half=False)
    return copy


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer itself, where a bf16 copy keeps it in float32 inside a wrapper."""
    return module.layer if isinstance(module, KeptInFloat) else module
