"""The operations of the augmentation policies: each image of a batch gets its own, without a loop over images.

The operations come in three families that each need one pass over the batch, with parameters per image:
*placement* is one affine map, *enhancement* one blend with a degenerate image, *tone* one table that maps the
256 grey levels. On an accelerator every family is computed for all images, so the host never waits; on the CPU only
for those that drew it. Results equal those of `torchvision.transforms.v2.functional` on
uint8 images (nearest-neighbour interpolation) up to one grey level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.data.colour_ops import luma
from robustflat.data.pixels import change_chosen, fill_colour, per_image, take_pixels
from robustflat.data.policy_tables import ENHANCEMENT, OPERATIONS, PLACEMENT, TONE

LEVELS = 256


class Step(NamedTuple):
    """One operation for each image.

    operation: position in `OPERATIONS`, int64 (B,). strength: signed, float32 (B,), in the unit of that
    operation. possible: the names that can occur; families without any of them are skipped.
    """

    operation: Tensor
    strength: Tensor
    possible: frozenset[str]

    def chose(self, name: str) -> Tensor:
        """Which images get the operation `name`, bool (B,)."""
        return self.operation == OPERATIONS.index(name)

    def strength_of(self, name: str) -> Tensor:
        """Strength of the operation `name`, zero for the images that do not get it, (B,)."""
        return torch.where(self.chose(name), self.strength, torch.zeros_like(self.strength))


def apply_steps(x: Tensor, steps: Sequence[Step], fill: tuple[float, ...], *, packed: bool | None = None) -> Tensor:
    """Apply one step after the other, on whole grey levels.

    Args:
        x: images (B, C, H, W) in [0, 1], C = 1 or 3; first rounded to multiples of 1/255.
        steps: the operations in their order.
        fill: colour in [0, 1] of pixels that come from outside the image.
        packed: see `change_chosen`.

    Returns:
        Images of the same shape; those that no operation changed stay bit for bit.
    """
    levels = (x.float() * (LEVELS - 1)).round()
    families: dict[tuple[str, ...], Callable[[Tensor, Step], Tensor]] = {
        PLACEMENT: partial(_place, background=fill_colour(fill, levels, scale=LEVELS - 1)),
        ENHANCEMENT: _enhance,
        TONE: _change_tone,
    }
    touched = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for step in steps:
        for names, change in families.items():
            levels = _apply_family(levels, step, names, change, packed)
        touched = touched | ~step.chose("identity")
    changed = (levels / (LEVELS - 1)).clamp(0.0, 1.0).to(x.dtype)
    return torch.where(per_image(touched), changed, x)


def _apply_family(
    levels: Tensor, step: Step, names: tuple[str, ...], change: Callable[[Tensor, Step], Tensor], packed: bool | None
) -> Tensor:
    """Change the images whose operation is among `names`."""
    possible = [name for name in names if name in step.possible]
    if not possible:
        return levels
    chosen = torch.stack([step.chose(name) for name in possible]).any(0)

    def changed(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
        return change(images, Step(operation, strength, step.possible))

    return change_chosen(levels, chosen, changed, step.operation, step.strength, packed=packed)


def _place(levels: Tensor, step: Step, background: Tensor) -> Tensor:
    """Shear, translate or rotate; each pixel of the result is the nearest one of the original.

    With (X, Y) the position relative to the centre of the image, the source of a pixel is
    (a X + b Y + e, c X + d Y + f). Shears keep the top left corner of the image where it is.
    """
    height, width = levels.shape[-2:]
    angle = torch.deg2rad(step.strength_of("rotate"))
    shear_x, shear_y = step.strength_of("shear_x"), step.strength_of("shear_y")
    a, b = angle.cos(), shear_x - angle.sin()
    c, d = shear_y + angle.sin(), angle.cos()
    e = shear_x * (height / 2) - step.strength_of("translate_x")
    f = shear_y * (width / 2) - step.strength_of("translate_y")
    horizontal = torch.arange(width, device=levels.device) - (width - 1) / 2
    vertical = (torch.arange(height, device=levels.device) - (height - 1) / 2).unsqueeze(1)
    a, b, c, d, e, f = (entry.view(-1, 1, 1) for entry in (a, b, c, d, e, f))
    column = (a * horizontal + b * vertical + e + (width - 1) / 2).round().long()
    row = (c * horizontal + d * vertical + f + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = torch.where(inside, row * width + column, 0)
    return torch.where(inside.unsqueeze(1), take_pixels(levels, index), background)


def _enhance(levels: Tensor, step: Step) -> Tensor:
    """Blend with black, the grey image, its mean grey or the blurred image: strength s gives 1 + s parts of
    the image and -s parts of the other.
    """
    grey = luma(levels).floor()
    other = torch.where(per_image(step.chose("color")), grey, torch.zeros_like(grey))
    other = torch.where(per_image(step.chose("contrast")), grey.mean((1, 2, 3), keepdim=True), other)
    strength = per_image(step.strength)
    result = (1 + strength) * levels - strength * other
    if "sharpness" in step.possible:
        # as a difference, so that the border, which is not blurred, keeps its levels exactly
        sharpened = levels + strength * (levels - _blurred(levels))
        result = torch.where(per_image(step.chose("sharpness")), sharpened, result)
    if levels.shape[1] == 1:  # grey images have no colour to change; blending would round some levels down
        result = torch.where(per_image(step.chose("color")), levels, result)
    return result.clamp(0, LEVELS - 1).floor()


def _blurred(levels: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, the middle one counted 5 times, in whole levels; the border stays."""
    if min(levels.shape[-2:]) < 3:
        return levels
    three = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
    blurred = levels.clone()
    # sums of whole levels are exact, unlike a convolution with thirteenths
    blurred[:, :, 1:-1, 1:-1] = ((nine + 4 * levels[:, :, 1:-1, 1:-1]) / 13).round()
    return blurred


def _change_tone(levels: Tensor, step: Step) -> Tensor:
    """Map the levels of each channel by a table of its own."""
    pixels = levels.flatten(2).long()  # (B, C, H * W)
    level = torch.arange(LEVELS, device=levels.device, dtype=levels.dtype)
    table = level.expand(*levels.shape[:2], LEVELS)
    strength = step.strength.view(-1, 1, 1)
    if "posterize" in step.possible:
        dropped = (8 - step.strength_of("posterize")).clamp(0, 8).int()
        width = torch.bitwise_left_shift(torch.ones_like(dropped), dropped).view(-1, 1, 1).to(levels.dtype)
        table = torch.where(step.chose("posterize").view(-1, 1, 1), (level / width).floor() * width, table)
    if "solarize" in step.possible:
        solarized = torch.where(level >= strength * (LEVELS - 1), LEVELS - 1 - level, level)
        table = torch.where(step.chose("solarize").view(-1, 1, 1), solarized, table)
    if "invert" in step.possible:
        table = torch.where(step.chose("invert").view(-1, 1, 1), LEVELS - 1 - level, table)
    if "autocontrast" in step.possible:
        table = torch.where(step.chose("autocontrast").view(-1, 1, 1), _stretched(levels, level), table)
    if "equalize" in step.possible:
        table = torch.where(step.chose("equalize").view(-1, 1, 1), _equalized(pixels, level), table)
    return table.gather(2, pixels).view_as(levels)


def _stretched(levels: Tensor, level: Tensor) -> Tensor:
    """Table (B, C, 256) that stretches each channel's levels to 0 .. 255; one with a single level stays."""
    low, high = levels.amin((2, 3)).unsqueeze(2), levels.amax((2, 3)).unsqueeze(2)
    flat = high == low
    span = torch.where(flat, torch.ones_like(low), (high - low) * (1 / (LEVELS - 1)))
    stretched = ((level - low) / span).clamp(0, LEVELS - 1).floor()
    return torch.where(flat, level.expand_as(stretched), stretched)


def _equalized(pixels: Tensor, level: Tensor) -> Tensor:
    """Table (B, C, 256) that makes the levels of each channel about equally frequent.

    As in the Python Imaging Library: a level becomes the number of pixels below it, in units of `unit`, the
    255th part of the pixels below the highest level; channels too small or too uniform for that stay.
    """
    counts = torch.zeros(*pixels.shape[:2], LEVELS, dtype=torch.int32, device=pixels.device)
    counts.scatter_add_(2, pixels, torch.ones_like(counts[..., :1]).expand_as(pixels))
    highest = pixels.amax(2, keepdim=True)
    unit = (pixels.shape[2] - counts.gather(2, highest)) // (LEVELS - 1)
    below = counts.cumsum(2) - counts
    table = ((below + unit // 2) // unit.clamp(min=1)).clamp(max=LEVELS - 1).to(level.dtype)
    return torch.where(unit > 0, table, level.expand_as(table))
