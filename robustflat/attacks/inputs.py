"""Checks of the images and labels that an attack or a measure is given, before torch trips over them."""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.errors import UserError


def check_shapes(x: Tensor, y: Tensor) -> None:
    """Refuse images and labels of the wrong shape or type. Looks at no value, so it never waits for a GPU.

    Args:
        x: images, floating point (B, C, H, W).
        y: int64 labels (B,), int64 pairs (label, target) (B, 2), or floating-point probabilities (B, K).

    Raises:
        UserError: saying what was given and what is wanted.
    """
    if x.ndim != 4:
        raise UserError(f"images must have shape (B, C, H, W), got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise UserError(f"images must be floating point in [0, 1], got {x.dtype}. Divide 0..255 images by 255.")
    if y.shape[:1] != x.shape[:1]:
        raise UserError(f"there must be one label per image, got {x.shape[0]} images and y of shape {tuple(y.shape)}.")
    if y.is_floating_point():
        if y.ndim != 2:
            raise UserError(f"floating-point labels are probabilities (B, K), got shape {tuple(y.shape)}.")
    elif y.dtype != torch.int64:
        raise UserError(f"labels must be int64, or floating-point probabilities, got {y.dtype}. Use y.long().")
    elif y.ndim != 1 and y.shape[1:] != (2,):
        raise UserError(f"int64 labels must have shape (B,), or (B, 2) with a target, got {tuple(y.shape)}.")
    if x.device != y.device:
        raise UserError(f"images and labels must be on one device, got {x.device} and {y.device}.")


def check_images(x: Tensor, y: Tensor, classes: int | None = None) -> None:
    """Refuse images outside [0, 1], labels outside 0..classes-1, and all that `check_shapes` refuses.

    It reads values and so waits for a GPU: call it once per data set at a front door, not inside a training
    loop.

    Args:
        x: images (B, C, H, W).
        y: labels, as in `check_shapes`.
        classes: number of classes of the model; `None` leaves the largest label unchecked.

    Raises:
        UserError: with the range found and the range allowed.
    """
    check_shapes(x, y)
    if x.shape[0] == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    if not (low >= 0.0 and high <= 1.0):  # also true for not-a-number
        raise UserError(f"images must lie in [0, 1], got values from {low:g} to {high:g}. {_hint(low, high)}")
    if y.is_floating_point():
        _check_probabilities(y, classes)
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(y))
    if smallest < 0 or (classes is not None and largest >= classes):
        allowed = "0 or more" if classes is None else f"0..{classes - 1} for {classes} classes"
        raise UserError(f"labels must be {allowed}, got values from {smallest} to {largest}.")


def check_box_on_cpu(x: Tensor, low: float, high: float) -> None:
    """Refuse images outside the box, where looking costs no waiting: on the CPU.

    Args:
        x: images (B, C, H, W), B >= 1.
        low, high: ends of the box; rounding beyond them is overlooked.

    Raises:
        UserError: with the range found and the range allowed.
    """
    if x.device.type != "cpu":
        return
    smallest, largest = (float(bound) for bound in torch.aminmax(x.detach()))
    if not (smallest >= low - _ROUNDING and largest <= high + _ROUNDING):  # also true for not-a-number
        found = f"values from {smallest:g} to {largest:g}"
        raise UserError(f"images must lie in [{low:g}, {high:g}], got {found}. {_hint(smallest, largest, high)}")


def check_labels_on_cpu(logits: Tensor, y: Tensor) -> None:
    """Refuse labels that are no column of logits (B, K), where looking costs no waiting: on the CPU.

    Args:
        logits: (B, K), B >= 1.
        y: labels, as in `check_shapes`.

    Raises:
        UserError: with the range found and the range allowed.
    """
    if y.device.type != "cpu" or y.is_floating_point():
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(y))
    if smallest < 0 or largest >= logits.shape[1]:
        classes = logits.shape[1]
        allowed = f"0..{classes - 1} for {classes} classes"
        raise UserError(f"labels must be {allowed}, got values from {smallest} to {largest}.")


_ROUNDING = 1e-4


def _hint(smallest: float, largest: float, high: float = 1.0) -> str:
    """What is probably wrong with images of this range, for a box that ends at `high`."""
    if largest != largest:
        return "Some pixels are not a number: see images.isnan()."
    if smallest >= 0 and largest > 2 * high:
        return "Are they in 0..255 units? Divide by 255."
    return "Normalisation belongs into the model: wrap it so that it takes images in [0, 1]."


def _check_probabilities(y: Tensor, classes: int | None) -> None:
    if classes is not None and y.shape[1] != classes:
        raise UserError(f"probabilities must have one column per class ({classes}), got {y.shape[1]}.")
    sums = y.detach().sum(dim=1)
    if not (bool((y >= 0).all()) and bool((sums - 1).abs().max() < 1e-2)):
        raise UserError("probabilities must be non-negative and sum to 1 in every row.")
