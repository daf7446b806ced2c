"""Augmentations that mix pairs of images together with their labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.data.draws import integers, permutation, symmetric_beta
from robustflat.data.pixels import per_image, require_images
from robustflat.data.placement import within
from robustflat.errors import UserError, require_range


class MixDraw(NamedTuple):
    """Which image each one is mixed with, int64 (B,), and the share it keeps of itself, (B,) in [0, 1]."""

    partner: Tensor
    share: Tensor


class Boxes(NamedTuple):
    """Rows top .. bottom - 1 and columns left .. right - 1 of a rectangle per image, int64 (B,) each."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor


class MixUp:
    """Weighted mean of two images and of their labels: s x + (1 - s) x', s ~ Beta(alpha, alpha) for each image.

    Zhang et al., ICLR 2018. The partner is the image at the same place of a permuted batch.

    Args:
        alpha: > 0; small values mix little, 1 draws the share uniformly.

    Raises:
        UserError: for an alpha that is not positive or not finite.
    """

    mixes_labels = True

    def __init__(self, *, alpha: float = 1.0) -> None:
        _require_alpha(alpha, "MixUp")
        self.alpha = alpha

    def draw(self, x: Tensor, generator: torch.Generator) -> MixDraw:
        """Partner and share of each image of x."""
        return _mix_draw(self.alpha, x, generator)

    def __call__(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix images x (B, C, H, W) in [0, 1] with labels y, int64 (B,) or probabilities (B, K).

        Returns:
            Mixed images (B, C, H, W) and label probabilities (B, K), K = classes.
        """
        require_images(x, "MixUp")
        probabilities = label_probabilities(y, classes, x)
        partner, share = self.draw(x, generator)
        kept = per_image(share.to(x.dtype))
        mixed = (kept * x + (1 - kept) * x[partner]).clamp(0.0, 1.0)
        return mixed, _mixed_labels(probabilities, partner, share)


class CutMix:
    """Replace a random rectangle of each image by that of another; labels are mixed by area.

    Yun et al., ICCV 2019; with adversarial training Rebuffi et al. 2021. A share s ~ Beta(alpha, alpha) gives a
    rectangle of sides sqrt(1 - s) H and sqrt(1 - s) W around a uniform pixel, cut off at the border; the labels
    weigh by the area that is left of it.

    Args:
        alpha: > 0; 1 draws the area before cutting off uniformly.

    Raises:
        UserError: for an alpha that is not positive or not finite.
    """

    mixes_labels = True

    def __init__(self, *, alpha: float = 1.0) -> None:
        _require_alpha(alpha, "CutMix")
        self.alpha = alpha

    def draw(self, x: Tensor, generator: torch.Generator) -> tuple[MixDraw, Boxes]:
        """Partner, share really kept, and rectangle of each image of x."""
        partner, share = _mix_draw(self.alpha, x, generator)
        count, (height, width) = x.shape[0], x.shape[2:]
        top, bottom = _interval(height, share, integers(height, (count,), generator, x.device))
        left, right = _interval(width, share, integers(width, (count,), generator, x.device))
        kept = 1 - (bottom - top) * (right - left) / (height * width)
        return MixDraw(partner, kept), Boxes(top, bottom, left, right)

    def __call__(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mix images x (B, C, H, W) in [0, 1] with labels y, int64 (B,) or probabilities (B, K).

        Returns:
            Mixed images (B, C, H, W) and label probabilities (B, K), K = classes.
        """
        require_images(x, "CutMix")
        probabilities = label_probabilities(y, classes, x)
        (partner, kept), box = self.draw(x, generator)
        rows = within(box.top, box.bottom, x.shape[2]).unsqueeze(2)
        columns = within(box.left, box.right, x.shape[3]).unsqueeze(1)
        mixed = torch.where((rows & columns).unsqueeze(1), x[partner], x)
        return mixed, _mixed_labels(probabilities, partner, kept)


def label_probabilities(y: Tensor, classes: int, x: Tensor) -> Tensor:
    """Labels y, int64 (B,) or probabilities (B, K), as probabilities (B, K) of x's type.

    Raises:
        UserError: if y does not fit x or `classes`.
    """
    if y.dim() not in (1, 2) or y.shape[0] != x.shape[0]:
        raise UserError(
            f"labels must be classes ({x.shape[0]},) or probabilities ({x.shape[0]}, {classes}), one row per "
            f"image, got {tuple(y.shape)}."
        )
    if y.dim() == 2:
        if y.shape[1] != classes:
            raise UserError(f"label probabilities have {y.shape[1]} columns, but the data has {classes} classes.")
        return y.to(x.dtype)
    # on an accelerator this check would make the host wait, and the loss would fail anyway
    if y.device.type == "cpu" and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise UserError(f"labels must lie in 0..{classes - 1}, got {int(y.min())}..{int(y.max())}.")
    return (y.unsqueeze(1) == torch.arange(classes, device=y.device)).to(x.dtype)


def _require_alpha(alpha: float, name: str) -> None:
    hint = f"To mix nothing leave {name} out."
    require_range("alpha", alpha, low=0.0, high=math.inf, low_open=True, high_open=True, hint=hint)


def _mix_draw(alpha: float, x: Tensor, generator: torch.Generator) -> MixDraw:
    """Partner and Beta(alpha, alpha) share of each image of x."""
    partner = permutation(x.shape[0], generator, x.device)
    return MixDraw(partner, symmetric_beta(alpha, x.shape[0], generator, x.device))


def _mixed_labels(probabilities: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """Label probabilities (B, K) of the mixtures."""
    kept = share.to(probabilities.dtype).unsqueeze(1)
    return kept * probabilities + (1 - kept) * probabilities[partner]


def _interval(length: int, share: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of an interval of sqrt(1 - share) * length pixels around `centre`, cut off at 0 and `length`."""
    half = (length * (1 - share).clamp(min=0.0).sqrt()).long() // 2
    return (centre - half).clamp(min=0), (centre + half).clamp(max=length)
