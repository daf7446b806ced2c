"""Any transform of torchvision as an augmentation of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustflat.data.pixels import require_images
from robustflat.errors import UserError


class TorchvisionTransform:
    """Apply a transform of `torchvision.transforms.v2` (or any function of image tensors).

    Such transforms draw from torch's global generators. These are forked, seeded from our generator, and put
    back, so that the result is reproducible and nobody else's draws shift. The seed passes through the host,
    so on an accelerator the host waits once per call.

    Args:
        transform: images (..., C, H, W) float in [0, 1] -> images of the same shape, float in [0, 1] or uint8.
        per_image: call it once for each image, so that each gets its own random parameters (slow); otherwise
            once for the whole batch, which then shares them (most transforms).

    Raises:
        UserError: if the transform cannot be called; when called, if its result has another shape.
    """

    def __init__(self, transform: Callable[[Tensor], Any], *, per_image: bool = True) -> None:
        if not callable(transform):
            raise UserError(
                f"transform must be callable, such as torchvision.transforms.v2.RandomErasing(), got {transform!r}."
            )
        self.transform = transform
        self.per_image = per_image

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Transform images x (B, C, H, W), float in [0, 1]; what leaves [0, 1] is clamped."""
        require_images(x, "TorchvisionTransform")
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.default_generator.manual_seed(seed)
            if x.is_cuda:
                torch.cuda.default_generators[x.get_device()].manual_seed(seed)
            result = self._apply(x)
        if result.dtype == torch.uint8:
            result = result.to(x.dtype) / 255
        return result.to(x.dtype).clamp(0.0, 1.0)

    def _apply(self, x: Tensor) -> Tensor:
        """The transform's result on x, checked."""
        if not self.per_image:
            return self._checked(self.transform(x), x)
        if x.shape[0] == 0:
            return x
        return torch.stack([self._checked(self.transform(image), image) for image in x])

    def _checked(self, result: Any, original: Tensor) -> Tensor:
        """Refuse a result that is no image tensor of the original's shape."""
        if not isinstance(result, Tensor) or result.shape != original.shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise UserError(
                f"{type(self.transform).__name__} must keep the shape {tuple(original.shape)}, but returned {got}. "
                "Add a Resize or crop of that size after it."
            )
        return result
