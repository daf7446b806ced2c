"""Normalisation layers: torch's batch norm and literal formulas as oracles."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from robustflat.errors import UserError
from robustflat.models.modes import frozen_statistics, is_norm_layer
from robustflat.models.norms import (
    NORMS,
    ChannelLayerNorm,
    ReBatchNorm,
    flat_norm_layer,
    group_count,
    has_scale,
    norm_layer,
    zero_scale_,
)


def _pair(shape: tuple[int, ...]) -> tuple[ReBatchNorm, nn.BatchNorm2d | nn.BatchNorm1d, torch.Tensor]:
    """A rebn layer, torch's batch norm with scale 1 + weight, and features of `shape`, in float64."""
    ours = ReBatchNorm(shape[1]).double()
    theirs = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).double()
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
        theirs.weight.copy_(1 + ours.weight)
        theirs.bias.copy_(ours.bias)
    return ours, theirs, torch.randn(shape, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5)])
def test_rebn_is_batch_norm_with_scale_one_plus_weight(shape: tuple[int, ...]) -> None:
    ours, theirs, x = _pair(shape)
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
        x = x + 1
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_rebn_has_the_gradients_of_batch_norm() -> None:
    ours, theirs, x = _pair((6, 5, 4, 3))
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_rebn_starts_with_zero_weight_and_unit_scale() -> None:
    layer = ReBatchNorm(4)
    assert torch.equal(layer.weight, torch.zeros(4))
    assert torch.equal(layer.bias, torch.zeros(4))
    assert torch.equal(layer.scale, torch.ones(4))


def test_rebn_follows_update_bn_with_cumulative_averages() -> None:
    ours, theirs, x = _pair((6, 5, 4, 3))
    batches = [x, 2 * x + 1, 3 * x]
    update_bn(batches, ours)
    update_bn(batches, theirs)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    expected = torch.stack([b.mean(dim=(0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(ours.running_mean, expected)


def test_rebn_statistics_can_be_frozen() -> None:
    ours, theirs, x = _pair((6, 5, 4, 3))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with frozen_statistics(ours):
        torch.testing.assert_close(ours(x), theirs(x))
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_rebn_without_running_statistics_uses_the_batch() -> None:
    ours, theirs, x = _pair((6, 5, 4, 3))
    for layer in (ours, theirs):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = None
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_rebn_keys_are_those_of_batch_norm() -> None:
    assert list(ReBatchNorm(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_channel_layer_norm_matches_the_formula() -> None:
    layer = ChannelLayerNorm(5).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        (512, 32),
        (128, 32),
        (64, 32),
        (48, 24),
        (32, 16),
        (16, 8),
        (24, 8),
        (40, 8),
        (8, 4),
        (20, 4),
        (3, 1),
        (1, 1),
    ],
)
def test_group_count_is_the_first_that_fits(channels: int, groups: int) -> None:
    assert group_count(channels) == groups
    assert norm_layer("gn", channels).num_groups == groups


@pytest.mark.parametrize("name", NORMS)
def test_every_layer_keeps_the_shape_and_is_recognised_as_norm(name: str) -> None:
    layer, flat = norm_layer(name, 16), flat_norm_layer(name, 16)
    assert layer(torch.randn(4, 16, 3, 3)).shape == (4, 16, 3, 3)
    assert flat(torch.randn(4, 16)).shape == (4, 16)
    assert is_norm_layer(layer) is is_norm_layer(flat) is (name != "none")
    assert bool(list(layer.parameters())) is bool(list(flat.parameters())) is has_scale(name)


@pytest.mark.parametrize("name", ["bn", "rebn", "gn", "ln"])
def test_zero_scale_leaves_nothing_of_the_input(name: str) -> None:
    layer = norm_layer(name, 16)
    zero_scale_(layer)
    assert torch.equal(layer(torch.randn(4, 16, 3, 3)), torch.zeros(4, 16, 3, 3))


@pytest.mark.parametrize("name", ["fixedbn", "fixedgn", "none"])
def test_zero_scale_needs_a_scale(name: str) -> None:
    with pytest.raises(UserError, match="has no learnable scale"):
        zero_scale_(norm_layer(name, 16))


@pytest.mark.parametrize("make", [norm_layer, flat_norm_layer])
def test_unknown_name_and_bad_width_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=r"norm must be one of bn, .*got 'rebm'. Did you mean 'rebn'?"):
        make("rebm", 8)
    with pytest.raises(UserError, match=r"must lie in .1, inf., got 0"):
        make("bn", 0)
