"""Augmentations of whole batches on the device, by the names that configs use.

Each is called with `(x, generator)`: images (B, C, H, W), float32 in [0, 1], and the generator that every draw
comes from; it returns images of the same shape, type and range. Random parameters differ from image to image,
the host never waits for the device (only TorchvisionTransform does), x is not modified, and nothing is normalised:
models do that themselves. Where the
attribute `mixes_labels` is true (MixUp, CutMix) the call is `(x, y, classes, generator) -> (x, probabilities)`.
"""

from __future__ import annotations

from robustflat.data.jitter import ColorJitter
from robustflat.data.mixing import CutMix, MixUp
from robustflat.data.placement import Cutout, Flip, PadCrop, PadResize, Rotate90
from robustflat.data.policies import AutoAugment, RandAugment, TrivialAugment
from robustflat.data.torchvision_transform import TorchvisionTransform

__all__ = [
    "AutoAugment",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "Flip",
    "MixUp",
    "PadCrop",
    "PadResize",
    "RandAugment",
    "Rotate90",
    "TorchvisionTransform",
    "TrivialAugment",
]
