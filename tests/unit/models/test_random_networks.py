"""Random networks in many spellings: fast copies compute their logits and gradients, also after weights have moved."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robustflat.models.convolutions import can_convolve
from robustflat.models.fused import Fused, fused
from robustflat.models.mirror import Mirror
from robustflat.models.norms import ReBatchNorm

CHANNELS = 6

CONVOLUTIONS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, (1, 5), padding=(0, 2)),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=2),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2, groups=CHANNELS),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding="same", bias=False),
    lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"),
    lambda: parametrizations.weight_norm(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
)
NORMS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.BatchNorm2d(CHANNELS),
    lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    lambda: ReBatchNorm(CHANNELS),
    lambda: nn.GroupNorm(2, CHANNELS),
    nn.Identity,
)
RECTIFIERS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu,
    Tensor.relu_,
    lambda t: F.relu(t, inplace=True),
    lambda t: F.relu(t, True),
    lambda t: F.leaky_relu(t, 0.1),
)


class Block(nn.Module):
    """Two layers, joined with their input in one of many ways."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.first, self.second = (choose.choice(CONVOLUTIONS)() for _ in range(2))
        self.norm, self.other = (choose.choice(NORMS)() for _ in range(2))
        self.relu, self.clip = nn.ReLU(inplace=choose.random() < 0.3), choose.choice(RECTIFIERS)
        self.register_buffer("scale", torch.ones(CHANNELS, 1, 1))
        self.gate = nn.Parameter(torch.zeros(1) if choose.random() < 0.3 else torch.ones(1))
        self.join = choose.choice([name for name in dir(self) if name.startswith("join_")])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.join)(x)
        return result

    def layers(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.clip(self.norm(self.first(x)))))  # type: ignore[no-any-return]

    def join_residual(self, x: Tensor) -> Tensor:
        return self.relu(self.layers(x) + x)  # type: ignore[no-any-return]

    def join_in_place(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y += x
        return self.relu(y)  # type: ignore[no-any-return]

    def join_preactivation(self, x: Tensor) -> Tensor:
        return torch.add(x, self.second(self.relu(self.norm(self.first(self.clip(self.other(x + 0)))))), alpha=0.5)

    def join_around(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.norm(y).relu() + self.other(self.second(y))  # type: ignore[no-any-return]

    def join_rectified(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.other(self.second(self.relu(y)))  # type: ignore[no-any-return]

    def join_both_signs(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.relu(y) - 0.3 * self.relu(-y)  # type: ignore[no-any-return]

    def join_gated(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return y * self.other(self.second(y.mean((2, 3), keepdim=True))).sigmoid().expand_as(y)  # type: ignore[no-any-return]

    def join_scaled(self, x: Tensor) -> Tensor:
        return x * (1 / self.scale) + self.gate * self.layers(x)  # type: ignore[operator]

    def join_without_gradient(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layers(x)
        return x + self.gate * y

    def join_shared(self, x: Tensor) -> Tensor:
        return self.norm(self.first(self.norm(self.first(x)))).relu_()  # type: ignore[no-any-return]

    def join_shuffled(self, x: Tensor) -> Tensor:
        one, other = self.layers(x).chunk(2, 1)
        y = torch.cat([other * 2, one], 1)
        return y.reshape(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)

    def join_signs(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.norm(y) * (y > 0) + x


class Random(nn.Module):
    def __init__(self, choose: random.Random, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, CHANNELS, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(choose) for _ in range(3)))
        self.shrink = nn.Conv2d(CHANNELS, CHANNELS, 1, stride=2, bias=False)
        self.pool = choose.choice([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(2 * CHANNELS, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        z = self.blocks(y * 1.0)
        features = torch.cat([self.pool(self.shrink(z)).flatten(1), z.amax((2, 3))], 1)
        logits: Tensor = self.head(features)
        return logits


def move(model: nn.Module, size: float) -> None:
    """Weights, statistics and buffers as after some training."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.mul_(1 + size * torch.rand_like(t))
        for t in model.parameters():
            t.add_(0.1 * size * torch.randn_like(t))
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                assert layer.running_mean is not None
                layer.running_mean.add_(size * torch.randn_like(layer.running_mean))


def answers(model: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    logits = model(point)
    (grad,) = torch.autograd.grad((logits * weights).sum(), point)
    return logits.detach(), grad


@pytest.mark.parametrize("seed", range(40))
def test_fast_copies_compute_what_the_network_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustflat.models.fused._WORTH", 0)
    torch.manual_seed(seed)
    choose = random.Random(seed)
    channels, size = choose.choice([1, 3]), choose.choice([(8, 8), (5, 7), (9, 4)])
    model = Random(choose, channels).eval()
    if choose.random() < 0.3:
        for name, p in model.named_parameters():
            p.data.mul_(not name.endswith("bias"))
    example = torch.rand(choose.choice([1, 2, 8]), channels, *size)
    mirror = Mirror(model, example)
    fast = fused(mirror.copy, example)
    for moved in (0.0, 0.5, 0.5):
        move(model, moved)
        mirror.refreshed()
        assert mirror.follows(model)
        count = choose.choice([1, 3, 9])
        x, weights = torch.rand(count, channels, *size), torch.randn(count, 4)
        expected = answers(copy.deepcopy(model).double(), x.double(), weights.double())
        for network in (mirror.copy, fast):
            for found, right in zip(answers(network, x, weights), expected, strict=True):
                assert float((found - right).norm() / right.norm()) < 1e-3
            with torch.no_grad():
                assert float((network(x) - expected[0]).norm() / expected[0].norm()) < 1e-3


@pytest.mark.skipif(not can_convolve(), reason="PyTorch without oneDNN's fused convolutions")
def test_many_of_them_are_fused() -> None:
    kinds = []
    for seed in range(12):
        torch.manual_seed(seed)
        model, example = Random(random.Random(seed), 3).eval(), torch.rand(2, 3, 8, 8)
        kinds.append(type(fused(Mirror(model, example).copy, example)))
    assert kinds.count(Fused) >= 3
