"""Augmentations that move or cover pixels: crop, resize, flip, cut out, rotate by right angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robustflat.data.draws import integers, uniform
from robustflat.data.pixels import (
    checked_fill,
    fill_colour,
    per_image,
    require_fits,
    require_images,
    take_pixels,
)
from robustflat.errors import UserError, require_range


class PadCrop:
    """Pad every side by `padding` pixels, then cut out a random window of the original size.

    The usual augmentation of CIFAR (Lee et al. 2015; He et al. 2016), and what the paper describes.

    Args:
        padding: pixels added on each side, in 0 .. min(H, W).
        fill: colour of the added pixels in [0, 1], one number or one per channel.

    Raises:
        UserError: for a negative padding or a fill outside [0, 1]; when called, for a padding larger than the
            images.
    """

    def __init__(self, *, padding: int = 4, fill: float | Sequence[float] = 0.0) -> None:
        require_range("padding", padding, low=0)
        self.padding = padding
        self.fill = checked_fill(fill)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Row and column of each window's corner in the padded image, int64 (2, B) in 0 .. 2 * padding."""
        return integers(2 * self.padding + 1, (2, x.shape[0]), generator, x.device)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop images x (B, C, H, W), float in [0, 1] or uint8; a window per image."""
        require_images(x, "PadCrop", bytes_allowed=True)
        count, channels, height, width = x.shape
        require_fits("PadCrop", "padding", self.padding, x, largest=min(height, width))
        pad, wide = self.padding, width + 2 * self.padding
        padded = fill_colour(self.fill, x).expand(count, channels, height + 2 * pad, wide).contiguous()
        padded[:, :, pad : pad + height, pad : pad + width] = x
        top, left = self.draw(x, generator).unsqueeze(-1)  # (B, 1) each
        rows = top + torch.arange(height, device=x.device)
        columns = left + torch.arange(width, device=x.device)
        return take_pixels(padded, rows.unsqueeze(2) * wide + columns.unsqueeze(1))


class PadResize:
    """Pad every side by its own random number of pixels, then resize back to the original size.

    What the released code does where the paper describes crops: a random zoom-out and shift with a border.
    Bilinear, half-pixel centres, no anti-aliasing.

    Args:
        max_pad: each side gets 0 .. max_pad pixels, all equally likely.
        fill: colour of the added pixels in [0, 1], one number or one per channel.

    Raises:
        UserError: for a negative max_pad or a fill outside [0, 1]; when called, for a max_pad larger than the
            images.
    """

    def __init__(self, *, max_pad: int = 4, fill: float | Sequence[float] = 0.0) -> None:
        require_range("max_pad", max_pad, low=0)
        self.max_pad = max_pad
        self.fill = checked_fill(fill)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels added at top, bottom, left and right of each image, int64 (4, B) in 0 .. max_pad."""
        return integers(self.max_pad + 1, (4, x.shape[0]), generator, x.device)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Pad and resize images x (B, C, H, W), float in [0, 1]."""
        require_images(x, "PadResize")
        require_fits("PadResize", "max_pad", self.max_pad, x, largest=min(x.shape[-2:]))
        top, bottom, left, right = self.draw(x, generator)
        background = fill_colour(self.fill, x)
        # relative to the fill colour the added pixels are zero, so they need not exist
        height, width = x.shape[-2:]
        rows = _source(height, top, bottom, x).unsqueeze(2).expand(-1, -1, width)
        columns = _source(width, left, right, x).unsqueeze(1).expand(-1, height, -1)
        grid = torch.stack([columns, rows], dim=3)
        shrunk = F.grid_sample(x - background, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (shrunk + background).clamp(0.0, 1.0)


def _source(length: int, before: Tensor, after: Tensor, x: Tensor) -> Tensor:
    """Where the pixels of a side that was padded and shrunk back come from.

    Args:
        length: pixels of the side, L.
        before, after: pixels added at its ends, (B,).
        x: gives the type.

    Returns:
        Positions (B, L) along the original side, -1 at its beginning and 1 at its end.
    """
    pixel = torch.arange(length, device=x.device, dtype=x.dtype)
    padded = (length + before + after).to(x.dtype).unsqueeze(1)
    source = (pixel + 0.5) * (padded / length) - before.to(x.dtype).unsqueeze(1)
    return source * (2 / length) - 1


class Flip:
    """Mirror images left to right, each with the given probability.

    Args:
        probability: in [0, 1].

    Raises:
        UserError: for a probability outside [0, 1].
    """

    def __init__(self, *, probability: float = 0.5) -> None:
        require_range("probability", probability, low=0.0, high=1.0)
        self.probability = probability

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Which images are mirrored, bool (B,)."""
        return uniform((x.shape[0],), generator, x.device) < self.probability

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror images x (B, C, H, W), float in [0, 1] or uint8."""
        require_images(x, "Flip", bytes_allowed=True)
        return torch.where(per_image(self.draw(x, generator)), x.flip(-1), x)


class Cutout:
    """Cover a square around a random pixel of each image; the part beyond the border is lost.

    DeVries and Taylor 2017. The centre is uniform over the pixels, so the visible part is often smaller than
    the square.

    Args:
        size: side of the square in pixels, in 1 .. min(H, W).
        fill: its colour in [0, 1], one number or one per channel.

    Raises:
        UserError: for a size below 1 or a fill outside [0, 1]; when called, for a size larger than the images.
    """

    def __init__(self, *, size: int = 16, fill: float | Sequence[float] = 0.0) -> None:
        require_range("size", size, low=1)
        self.size = size
        self.fill = checked_fill(fill)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Row and column of each square's centre, int64 (2, B)."""
        rows = integers(x.shape[2], (x.shape[0],), generator, x.device)
        return torch.stack([rows, integers(x.shape[3], (x.shape[0],), generator, x.device)])

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Cover a square of images x (B, C, H, W), float in [0, 1] or uint8."""
        require_images(x, "Cutout", bytes_allowed=True)
        height, width = x.shape[-2:]
        require_fits("Cutout", "size", self.size, x, largest=min(height, width))
        top, left = self.draw(x, generator) - self.size // 2
        square = within(top, top + self.size, height).unsqueeze(2) & within(left, left + self.size, width).unsqueeze(1)
        return torch.where(square.unsqueeze(1), fill_colour(self.fill, x), x)


def within(start: Tensor, stop: Tensor, length: int) -> Tensor:
    """Whether start <= position < stop, for the positions 0 .. length - 1: (B,), (B,) -> bool (B, length)."""
    position = torch.arange(length, device=start.device)
    return (position >= start.unsqueeze(1)) & (position < stop.unsqueeze(1))


class Rotate90:
    """Turn each image counter-clockwise by a random multiple of 90 degrees.

    The self-supervision of Gidaris et al. 2018 and Hendrycks et al. 2019 predicts how often it was turned: see
    `rotate`. Images must be square.
    """

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Number of quarter turns of each image, int64 (B,) in 0 .. 3."""
        return integers(4, (x.shape[0],), generator, x.device)

    def rotate(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Turned images (B, C, H, W) and the number of quarter turns k, int64 (B,) in 0 .. 3: the label.

        Raises:
            UserError: if the images are not square.
        """
        require_images(x, "Rotate90", bytes_allowed=True)
        if x.shape[2] != x.shape[3]:
            raise UserError(f"Rotate90 needs square images, got {x.shape[2]} x {x.shape[3]} pixels. Crop them first.")
        turns = self.draw(x, generator)
        turned = x
        for k in (1, 2, 3):
            turned = torch.where(per_image(turns == k), torch.rot90(x, k, (-2, -1)), turned)
        return turned, turns

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Turned images without the labels."""
        return self.rotate(x, generator)[0]
