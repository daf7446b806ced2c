"""Rebuilds the two networks of the reference figures, with their images and labels."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent


class ReferenceNetwork(NamedTuple):
    """A network in eval mode, images (N, C, H, W) in [0, 1] and labels int64 (N,)."""

    model: nn.Module
    images: Tensor
    labels: Tensor


def figures() -> dict[str, Any]:
    """The reference figures by name."""
    loaded: dict[str, Any] = json.loads((FOLDER / "reference.json").read_text())
    return loaded


def cnn_cifar10(dtype: torch.dtype = torch.float32) -> ReferenceNetwork:
    """Adversarially trained CNN of 24,458 parameters and 128 CIFAR-10 test images, (128, 3, 32, 32)."""
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, padding=1),
            bn1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, stride=2, padding=1),
            bn2=nn.BatchNorm2d(32),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(32, 64, 3, stride=2, padding=1),
            bn3=nn.BatchNorm2d(64),
            relu3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            logits=nn.Linear(64, 10),
        )
    )
    return _loaded(model, "cnn_cifar10.npz", dtype)


def mlp_digits(dtype: torch.dtype = torch.float32) -> ReferenceNetwork:
    """MLP of 1,210 parameters and 200 digits, as images (200, 1, 8, 8)."""
    layers = OrderedDict(flatten=nn.Flatten(), linear1=nn.Linear(64, 16), act1=nn.Tanh(), logits=nn.Linear(16, 10))
    return _loaded(nn.Sequential(layers), "mlp_digits.npz", dtype)


def _loaded(model: nn.Module, file: str, dtype: torch.dtype) -> ReferenceNetwork:
    with np.load(FOLDER / file) as arrays:
        weights = {
            name.removeprefix("weights/"): torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith("weights/")
        }
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    model.load_state_dict(weights, strict=True)
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2).to(dtype) / 255
    else:
        images = images.reshape(-1, 1, 8, 8).to(dtype)
    return ReferenceNetwork(model.to(dtype).eval(), images.contiguous(), labels.to(torch.int64))
