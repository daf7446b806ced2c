"""Wide ResNets: published counts and depths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from robustflat.errors import UserError
from robustflat.models.classifier import Classifier
from robustflat.models.preact_resnet import PreactBlock
from robustflat.models.wide_resnet import wide_resnet, wrn_28_10, wrn_34_10, wrn_34_20, wrn_70_16


def _counted(depth: int, widen: int, classes: int = 10) -> int:
    """Parameters by hand: 3x3 and 1x1 convolutions without bias, two numbers per channel in norms."""
    total, inputs = 27 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        for _ in range((depth - 4) // 6):
            total += 9 * inputs * width + 9 * width * width + 2 * inputs + 2 * width
            total += inputs * width if inputs != width else 0
            inputs = width
    return total + 2 * inputs + (inputs + 1) * classes


@pytest.mark.parametrize(
    ("build", "depth", "widen", "published"),
    [
        (wrn_28_10, 28, 10, 36_479_194),
        (wrn_34_10, 34, 10, 46_160_474),
        (wrn_34_20, 34, 20, 184.5e6),
        (wrn_70_16, 70, 16, 266.8e6),
    ],
)
def test_parameter_counts_are_the_published_ones(
    build: Callable[..., Classifier], depth: int, widen: int, published: float
) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build(classes=10).parameters())
    assert count == _counted(depth, widen)
    assert count == published if isinstance(published, int) else count == pytest.approx(published, rel=5e-4)
    assert f"{count:,} parameters" in (build.__doc__ or "")


@pytest.mark.parametrize(("depth", "blocks"), [(10, 3), (16, 6), (28, 12)])
def test_depth_counts_the_convolutions(depth: int, blocks: int) -> None:
    model = wide_resnet(depth=depth, widen=1, classes=4)
    assert sum(isinstance(m, PreactBlock) for m in model.modules()) == blocks
    assert model.eval()(torch.rand(2, 3, 16, 16)).shape == (2, 4)


def test_arguments_reach_the_network() -> None:
    with torch.device("meta"):
        model = wrn_28_10(classes=4, in_channels=1, norm="gn", activation="silu", dropout=0.3, auxiliary=True)
    block = next(m for m in model.modules() if isinstance(m, PreactBlock))
    assert isinstance(block.norm1, torch.nn.GroupNorm)
    assert isinstance(block.activation1, torch.nn.SiLU)
    assert block.dropout.p == 0.3
    assert model.auxiliary is not None
    assert model.body.stem.in_channels == 1


@pytest.mark.parametrize(("depth", "nearest"), [(32, 34), (29, 28), (4, 10), (18, 16)])
def test_impossible_depths_are_refused_with_the_nearest_possible(depth: int, nearest: int) -> None:
    with pytest.raises(UserError, match=rf"depth must be 6 n \+ 4 .* got {depth}. Use {nearest}"):
        wide_resnet(depth=depth, widen=1, classes=10)


def test_zero_width_is_refused() -> None:
    with pytest.raises(UserError, match="widen must lie in"):
        wide_resnet(depth=10, widen=0, classes=10)
