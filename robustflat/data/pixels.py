"""What all augmentations ask of a batch of images: its form, its fill colour, and pixels by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from robustflat.errors import UserError, require_range


def require_images(x: Tensor, name: str, *, bytes_allowed: bool = False, colours: bool = False) -> None:
    """Refuse what is not a batch of images.

    Args:
        x: what the augmentation received.
        name: the augmentation, for the message.
        bytes_allowed: whether uint8 images are as good as floating-point ones.
        colours: whether colour arithmetic follows, which needs 1 (grey) or 3 (red, green, blue) channels.

    Raises:
        UserError: for a wrong number of dimensions, a wrong type or a wrong number of channels.
    """
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"{name} takes images (B, C, H, W), got {got}. Add a batch dimension: x.unsqueeze(0).")
    if not (x.is_floating_point() or (bytes_allowed and x.dtype == torch.uint8)):
        allowed = "float32 in [0, 1] or uint8" if bytes_allowed else "float32 in [0, 1]"
        raise UserError(f"{name} takes images in {allowed}, got {x.dtype}. Convert uint8 with x.float() / 255.")
    if colours and x.shape[1] not in (1, 3):
        raise UserError(f"{name} needs images with 1 or 3 channels, got {x.shape[1]}. Leave it out for this data.")


def require_fits(name: str, argument: str, value: int, x: Tensor, *, largest: int) -> None:
    """Refuse a length in pixels that the images are too small for.

    Raises:
        UserError: if `value` exceeds `largest`.
    """
    if value > largest:
        height, width = x.shape[-2:]
        raise UserError(
            f"{name}: {argument} must be at most {largest} for images of {height} x {width} pixels, got {value}. "
            f"Set {argument} to {largest} or less."
        )


def checked_fill(fill: float | Sequence[float]) -> tuple[float, ...]:
    """The fill colour as a tuple: one value for all channels, or one per channel, in [0, 1].

    Raises:
        UserError: if it is neither a number nor a non-empty sequence of numbers in [0, 1].
    """
    values = (fill,) if isinstance(fill, Real) else fill
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UserError(f"fill must be a number or one number per channel, in [0, 1], got {fill!r}.")
    for value in values:
        if not isinstance(value, Real):
            raise UserError(f"fill must be a number or one number per channel, in [0, 1], got {fill!r}.")
        require_range("fill", float(value), low=0.0, high=1.0, hint="Write 125/255 as 0.4902.")
    return tuple(float(value) for value in values)


def fill_colour(fill: tuple[float, ...], x: Tensor, *, scale: float = 1.0) -> Tensor:
    """`scale` times the fill colour, for the channels of x: (1, 1 or C, 1, 1), type and device of x.

    For uint8 images the colour is in grey levels; `scale` other than 1 rounds to whole grey levels too.

    Raises:
        UserError: if the colour has neither 1 nor C entries.
    """
    if len(fill) not in (1, x.shape[1]):
        raise UserError(f"fill must have 1 or {x.shape[1]} numbers, one per channel, got {len(fill)}.")
    if x.dtype == torch.uint8:
        scale = 255.0
    values = fill if scale == 1.0 else tuple(float(round(scale * value)) for value in fill)
    # filling on the device, unlike copying a list there, does not make the host wait
    return torch.cat([x.new_full((1, 1, 1, 1), value) for value in values], dim=1)


def take_pixels(x: Tensor, index: Tensor) -> Tensor:
    """Pixels of each image by their position, the same for all its channels.

    Args:
        x: images (B, C, H, W).
        index: row * W + column of the wanted pixel, int64 (B, H', W').

    Returns:
        Images (B, C, H', W').
    """
    positions = index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, positions).view(x.shape[0], x.shape[1], *index.shape[1:])


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to be broadcast over images."""
    return values.view(-1, 1, 1, 1)


def change_chosen(
    x: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor, packed: bool | None = None
) -> Tensor:
    """Replace the chosen images by `change(images, *parameters)`; the others stay bit for bit.

    Args:
        x: images (B, C, H, W).
        chosen: bool (B,).
        change: changes each image independently of the others.
        parameters: (B, ...) each, one row per image.
        packed: compute the chosen images only, which needs their number on the host; otherwise all of them.
            `None`: only on the CPU, since elsewhere the host would have to wait.

    Returns:
        Images (B, C, H, W); x itself is not modified.
    """
    if not (x.device.type == "cpu" if packed is None else packed):
        return torch.where(per_image(chosen), change(x, *parameters), x)
    index = chosen.nonzero().squeeze(1)
    if index.numel() == 0:
        return x
    return x.index_copy(0, index, change(x[index], *(parameter[index] for parameter in parameters)))
