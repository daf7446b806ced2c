"""ConvNeXt: torchvision's block as oracle."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.convnext import CNBlock

from robustflat.errors import UserError
from robustflat.models.convnext import ConvNextBlock, convnext
from robustflat.models.layers import Layers


def test_block_computes_what_torchvision_computes() -> None:
    ours = ConvNextBlock(6, layers=Layers("ln", "gelu"))
    theirs = CNBlock(6, layer_scale=1.0, stochastic_depth_prob=0.0)
    source = [v for k, v in theirs.state_dict().items() if k != "layer_scale"]
    with torch.no_grad():
        for mine, value in zip(ours.state_dict().values(), source, strict=True):
            value.normal_()
            mine.copy_(value.view(mine.shape))
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_stages_double_the_channels_and_halve_the_size() -> None:
    model = convnext(classes=3, channels=4, depths=(1, 2))
    features = model.body.stage1(model.body.reduce1(model.body.stage0(model.body.reduce0(torch.rand(2, 3, 16, 16)))))
    assert features.shape == (2, 8, 4, 4)
    assert len(model.body.stage1) == 2


def test_empty_stages_are_refused() -> None:
    with pytest.raises(UserError, match="at least one stage"):
        convnext(classes=3, depths=())
    with pytest.raises(UserError, match="depths must lie in"):
        convnext(classes=3, depths=(1, 0))
