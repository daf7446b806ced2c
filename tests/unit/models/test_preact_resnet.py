"""Pre-activation ResNet: published count and a literal block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robustflat.errors import UserError
from robustflat.models.layers import Layers
from robustflat.models.preact_resnet import PreactBlock, preact_resnet18


def test_parameter_count_is_the_published_one() -> None:
    with torch.device("meta"):
        model = preact_resnet18(classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_172_170


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 1), (6, 2), (4, 2)])
def test_block_matches_its_formula(width: int, stride: int) -> None:
    block = PreactBlock(4, width, stride=stride, layers=Layers("bn", "relu")).double()
    x = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    active = F.batch_norm(x, None, None, block.norm1.weight, block.norm1.bias, True).relu()
    out = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    out = F.batch_norm(out, None, None, block.norm2.weight, block.norm2.bias, True).relu()
    out = F.conv2d(out, block.conv2.weight, padding=1)
    plain = width == 4 and stride == 1
    assert (block.shortcut is None) is plain
    short = x if plain else F.conv2d(active, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), out + short)


def test_without_a_norm_the_input_is_not_modified() -> None:
    block = PreactBlock(4, 4, stride=1, layers=Layers("none", "relu"))
    x = torch.randn(2, 4, 4, 4)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


def test_dropout_precedes_the_second_convolution() -> None:
    block = PreactBlock(4, 4, stride=1, layers=Layers("none", "relu", 0.5))
    x = torch.rand(2, 4, 6, 6)
    torch.manual_seed(5)
    dropped = block(x)
    torch.manual_seed(5)
    expected = block.conv2(F.dropout(torch.relu(block.conv1(torch.relu(x))), 0.5)) + x
    torch.testing.assert_close(dropped, expected)


def test_zero_channels_are_refused() -> None:
    with pytest.raises(UserError, match=r"channels must lie in \[1, inf\), got 0"):
        preact_resnet18(classes=10, channels=0)
