"""Colour arithmetic on images in [0, 1], with one parameter per image."""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.data.pixels import per_image

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in perceived brightness (ITU-R BT.601)."""


def luma(x: Tensor) -> Tensor:
    """Perceived brightness (B, 1, H, W) of images with 3 channels; grey images are their own."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def blend(x: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """Weighted sum ratio * x + (1 - ratio) * other, clamped to [0, 1]; ratio (B,) above 1 exaggerates."""
    return (x + (1 - per_image(ratio)) * (other - x)).clamp(0.0, 1.0)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour wheel of RGB images by `shift` full turns, (B,); grey images stay.

    Hue, saturation and value are those of the HSV cone: value V is the largest channel, chroma C the largest
    minus the smallest. With hue H in sixths of a turn, channel n in (5, 3, 1) of the result is
    V - C * clamp(min(k, 4 - k), 0, 1), k = (n + H) mod 6.
    """
    if x.shape[1] == 1:
        return x
    red, green, blue = x.unbind(1)
    value, smallest = x.amax(1), x.amin(1)
    chroma = value - smallest
    scale = torch.where(chroma > 0, chroma, torch.ones_like(chroma))  # the hue of grey does not matter
    hue = torch.where(
        value == red,
        (green - blue) / scale,
        torch.where(value == green, (blue - red) / scale + 2, (red - green) / scale + 4),
    )
    hue = hue + 6 * shift.view(-1, 1, 1)
    channels = []
    for n in (5, 3, 1):
        k = (hue + n) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0.0, 1.0))
    return torch.stack(channels, 1).clamp(0.0, 1.0)
