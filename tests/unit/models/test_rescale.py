"""Scaling before batch norm keeps the function; everything else is noticed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.models.preact_resnet import preact_resnet18
from robustflat.models.rescale import normalized_layers, output_change, rescaled, rescaled_like
from robustflat.models.resnet import resnet18
from tests.unit.flatness.networks import convnet, examples

IMAGES = examples(5)[0]


def test_only_layers_before_normalisation_are_found() -> None:
    assert normalized_layers(convnet(), IMAGES) == {"0": ["1"], "3": ["4"]}


def test_every_convolution_of_a_residual_network_is_found_by_watching_it() -> None:
    model = resnet18(classes=3, channels=4, mean=None, std=None)
    found = normalized_layers(model, torch.rand(1, 3, 8, 8))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(found) and set(found) == set(convolutions)
    assert rescaled(model, 2.0, torch.rand(2, 3, 8, 8)).change < 1e-4


def test_a_layer_whose_output_goes_around_its_norm_too_stays_as_it_is() -> None:
    model = preact_resnet18(classes=3, in_channels=1, channels=4)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 3.0)
    scaled = rescaled(model, 2.0, torch.rand(2, 1, 8, 8))
    assert scaled.change < 1e-5
    assert set(scaled.factors) == {f"body.blocks.{n}.conv1" for n in range(8)}


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_outputs_agree_to_rounding_while_weights_and_statistics_scale(factor: float) -> None:
    model = convnet(dtype=torch.float64)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    scaled = rescaled(model, factor, IMAGES)
    assert scaled.change < 1e-12
    after = scaled.model.state_dict()
    assert torch.equal(after["3.weight"], factor * before["3.weight"])
    assert torch.equal(after["3.bias"], factor * before["3.bias"])
    assert torch.equal(after["4.running_mean"], factor * before["4.running_mean"])
    assert torch.equal(after["7.weight"], before["7.weight"])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_without_absorbing_epsilon_the_function_is_kept_roughly_as_released() -> None:
    model = convnet(dtype=torch.float64)
    scaled = rescaled(model, 0.5, IMAGES, absorb_epsilon=False, tolerance=0.1)
    assert torch.allclose(scaled.model[1].running_var, model[1].running_var / 4)
    assert 1e-12 < scaled.change < 1e-2
    with pytest.raises(UserError, match="Scaling changed the outputs"):
        rescaled(model, 1e-3, IMAGES, absorb_epsilon=False)


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("per_layer", [True, False])
def test_the_norm_of_another_network_is_taken_over(norm: float, per_layer: bool) -> None:
    model, reference = convnet(0), convnet(1)
    scaled = rescaled_like(model, reference, IMAGES, norm=norm, per_layer=per_layer).model

    def size(network: nn.Module, layers: list[int]) -> float:
        tensors = [p.detach().double().flatten() for i in layers for p in network[i].parameters()]
        return float(torch.cat(tensors).norm(norm))

    for layers in ([0], [3]) if per_layer else ([0, 3],):
        assert size(scaled, layers) == pytest.approx(size(reference, layers), rel=1e-6)
    assert output_change(model, scaled, IMAGES) < 1e-5


def test_group_norm_needs_no_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, eps=1e-12), nn.Flatten(), nn.Linear(64, 3)).double()
    assert rescaled(model, 3.0, IMAGES).change < 1e-8


class Leaky(nn.Module):
    """Uses a convolution's output with and without normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return (F.relu(self.norm(z)) + z).flatten(1)


def test_outputs_that_change_are_refused() -> None:
    with pytest.raises(UserError, match="followed by a normalisation layer alone"):
        rescaled(Leaky().eval(), 2.0, IMAGES)


def test_wrong_factors_and_networks_without_normalisation_are_refused() -> None:
    with pytest.raises(UserError, match="factor of 0 must lie in"):
        rescaled(convnet(), 0.0, IMAGES)
    with pytest.raises(UserError, match="No normalisation layer follows '7'"):
        rescaled(convnet(), {"7": 2.0}, IMAGES)
    with pytest.raises(UserError, match="has no convolution or linear layer followed"):
        rescaled(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), 2.0, IMAGES)
    with pytest.raises(UserError, match="norm must be 1, 2 or infinity"):
        rescaled_like(convnet(), convnet(), IMAGES, norm=3)
    with pytest.raises(UserError, match="has no layer '3'"):
        rescaled_like(convnet(), convnet()[:3], IMAGES)
