"""A small network with batch norm and dropout, random images, and a trainer around them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from robustflat.attacks.pgd import Pgd
from robustflat.data.images import ImageSet
from robustflat.geometry.input_ball import LinfBall
from robustflat.gradients.plain import Plain
from robustflat.loggers.base import Null
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.rng import Streams
from robustflat.training.optimizers import sgd
from robustflat.training.schedules import constant
from robustflat.training.trainer import Trainer


def small_network(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def make_images(count: int = 26) -> ImageSet:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(3, (count,), generator=generator), name="noise", classes=3)


def add_noise(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def build_trainer(*, seed=0, model=None, data=None, **options) -> Trainer:
    """Trainer on 26 images, batch size 8, so 3 steps an epoch; any argument can be replaced."""
    streams = Streams(seed)
    defaults = {
        "model": small_network() if model is None else model,
        "data": make_images().stream(8, {"noise": add_noise}, streams) if data is None else data,
        "loss": CrossEntropy(),
        "attack": Pgd(LinfBall(0.1), steps=2, step_size=0.05),
        "gradient": Plain(),
        "make_optimizer": partial(sgd, lr=0.05),
        "make_schedule": constant,
        "epochs": 2,
        "logger": Null(),
        "streams": streams,
    }
    return Trainer(**(defaults | options))


@pytest.fixture
def make_trainer():
    return build_trainer


@pytest.fixture
def image_set():
    return make_images()


@pytest.fixture
def make_network():
    return small_network


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def same_state():
    return same
