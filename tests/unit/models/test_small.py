"""LeNet and multi-layer perceptron: counts of the paper's code, stages, order of layers."""

from __future__ import annotations

import pytest
import torch

from robustflat.errors import UserError
from robustflat.models.small import lenet, mlp


def test_counts_are_those_of_the_paper_code() -> None:
    with torch.device("meta"):
        big = lenet(classes=10, in_channels=3, image_size=32)
        flat = mlp(classes=10, in_channels=3, image_size=32)
    assert sum(p.numel() for p in big.parameters()) == 5_235_722
    assert sum(p.numel() for p in flat.parameters()) == 206_026


@pytest.mark.parametrize(("size", "widths"), [(32, [4, 8, 16]), (28, [4, 8]), (8, [4]), (6, [4]), (64, [4, 8, 16, 32])])
def test_lenet_halves_while_it_can(size: int, widths: list[int]) -> None:
    model = lenet(classes=3, image_size=size, channels=4, hidden=8)
    assert [m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)] == widths
    assert model(torch.rand(2, 1, size, size)).shape == (2, 3)


def test_lenet_without_hidden_layer_classifies_the_last_maps() -> None:
    model = lenet(classes=3, image_size=8, channels=4, hidden=0)
    assert model.head.in_features == 4 * 4 * 4


def test_mlp_normalises_after_the_activation() -> None:
    model = mlp(classes=3, image_size=4, units=(5,), activation="relu").eval()
    body, x = model.body, torch.rand(6, 1, 4, 4)
    body.norm0.running_mean.normal_()
    hidden = torch.relu(x.flatten(1) @ body.linear0.weight.T + body.linear0.bias)
    hidden = (hidden - body.norm0.running_mean) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)


def test_mlp_without_units_is_linear() -> None:
    model = mlp(classes=3, image_size=4, units=())
    x = torch.rand(6, 1, 4, 4)
    torch.testing.assert_close(model(x), x.flatten(1) @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("size", [7, 27, 4])
def test_lenet_refuses_sizes_that_cannot_be_halved(size: int) -> None:
    with pytest.raises(UserError, match=f"even image_size >= 6, got {size}"):
        lenet(classes=3, image_size=size)


def test_empty_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"units\[1\] must lie in"):
        mlp(classes=3, units=(4, 0))
    with pytest.raises(UserError, match="hidden must lie in"):
        lenet(classes=3, hidden=-1)
    with pytest.raises(UserError, match="image_size must lie in"):
        mlp(classes=3, image_size=0)
