"""The facts behind the augmentation policies: operations, strengths, and the sub-policies found by AutoAugment.

AutoAugment: Cubuk et al., CVPR 2019 (tables in its appendix); RandAugment: Cubuk et al., NeurIPS 2020;
TrivialAugment (the "wide" strengths): Mueller and Hutter, ICCV 2021. Strengths and sub-policies agree with
`torchvision.transforms.v2`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

PLACEMENT: Final = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCEMENT: Final = ("brightness", "color", "contrast", "sharpness")
TONE: Final = ("posterize", "solarize", "autocontrast", "equalize", "invert")
OPERATIONS: Final = ("identity", *PLACEMENT, *ENHANCEMENT, *TONE)
"""All operations; elsewhere an operation is its position in this tuple."""

SIGNED: Final = frozenset(PLACEMENT + ENHANCEMENT)
"""Operations whose strength is turned round in half of the cases."""

SEARCHED: Final = tuple(name for name in OPERATIONS if name != "invert")
"""What RandAugment and TrivialAugment choose from, all equally likely."""

SubPolicy: TypeAlias = tuple[tuple[str, float, int], tuple[str, float, int]]
"""Two operations in their order, each with its probability and strength 0..9 (0 where it has no strength)."""


class Reach(NamedTuple):
    """The largest strength of each operation.

    shear: tangent of the angle; translate_x, translate_y: pixels; rotate: degrees; enhance: distance of the
    factor from 1; posterize: bits taken away. Solarize always reaches from threshold 255 down to 0.
    """

    shear: float
    translate_x: float
    translate_y: float
    rotate: float
    enhance: float
    posterize: int


def narrow_reach(height: int, width: int) -> Reach:
    """Strengths of AutoAugment and RandAugment; translations 150 of 331 pixels (the ImageNet size then)."""
    return Reach(0.3, 150.0 / 331.0 * width, 150.0 / 331.0 * height, 30.0, 0.9, 4)


def wide_reach(translate: float) -> Reach:
    """Strengths of TrivialAugment "wide"; `translate` in pixels."""
    return Reach(0.99, translate, translate, 135.0, 0.99, 6)


@lru_cache(maxsize=64)
def strengths(reach: Reach, num_bins: int, device: torch.device) -> Tensor:
    """Strength of every operation in `num_bins` equal steps from none to `reach`.

    Returns:
        float32 (operations, num_bins); do not modify. Zero for operations without strength; posterize: bits
        kept; solarize: threshold as a fraction of 255; translations in whole pixels.
    """
    bins = {name: torch.zeros(num_bins) for name in OPERATIONS}
    bins["shear_x"] = bins["shear_y"] = torch.linspace(0.0, reach.shear, num_bins)
    bins["translate_x"] = torch.linspace(0.0, reach.translate_x, num_bins).trunc()
    bins["translate_y"] = torch.linspace(0.0, reach.translate_y, num_bins).trunc()
    bins["rotate"] = torch.linspace(0.0, reach.rotate, num_bins)
    for name in ENHANCEMENT:
        bins[name] = torch.linspace(0.0, reach.enhance, num_bins)
    bins["posterize"] = (8 - torch.arange(num_bins) * (reach.posterize / (num_bins - 1))).round()
    bins["solarize"] = torch.linspace(1.0, 0.0, num_bins)
    return torch.stack([bins[name] for name in OPERATIONS]).to(device)


AUTO_AUGMENT: Final[dict[str, tuple[SubPolicy, ...]]] = {
    "cifar10": (
        (("invert", 0.1, 0), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
        (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translate_x", 0.5, 8)),
        (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
        (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, 0)),
        (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
        (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
        (("color", 0.9, 9), ("equalize", 0.6, 0)),
        (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
        (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
        (("equalize", 0.8, 0), ("invert", 0.1, 0)),
        (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
    ),
    "svhn": (
        (("shear_x", 0.9, 4), ("invert", 0.2, 0)),
        (("shear_y", 0.9, 8), ("invert", 0.7, 0)),
        (("equalize", 0.6, 0), ("solarize", 0.6, 6)),
        (("invert", 0.9, 0), ("equalize", 0.6, 0)),
        (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
        (("shear_x", 0.9, 4), ("autocontrast", 0.8, 0)),
        (("shear_y", 0.9, 8), ("invert", 0.4, 0)),
        (("shear_y", 0.9, 5), ("solarize", 0.2, 6)),
        (("invert", 0.9, 0), ("autocontrast", 0.8, 0)),
        (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
        (("shear_x", 0.9, 4), ("solarize", 0.3, 3)),
        (("shear_y", 0.8, 8), ("invert", 0.7, 0)),
        (("equalize", 0.9, 0), ("translate_y", 0.6, 6)),
        (("invert", 0.9, 0), ("equalize", 0.6, 0)),
        (("contrast", 0.3, 3), ("rotate", 0.8, 4)),
        (("invert", 0.8, 0), ("translate_y", 0.0, 2)),
        (("shear_y", 0.7, 6), ("solarize", 0.4, 8)),
        (("invert", 0.6, 0), ("rotate", 0.8, 4)),
        (("shear_y", 0.3, 7), ("translate_x", 0.9, 3)),
        (("shear_x", 0.1, 6), ("invert", 0.6, 0)),
        (("solarize", 0.7, 2), ("translate_y", 0.6, 7)),
        (("shear_y", 0.8, 4), ("invert", 0.8, 0)),
        (("shear_x", 0.7, 9), ("translate_y", 0.8, 3)),
        (("shear_y", 0.8, 5), ("autocontrast", 0.7, 0)),
        (("shear_x", 0.7, 2), ("invert", 0.1, 0)),
    ),
    "imagenet": (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
        (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
        (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
        (("color", 0.4, 0), ("equalize", 0.6, 0)),
        (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
        (("invert", 0.6, 0), ("equalize", 1.0, 0)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    ),
}
