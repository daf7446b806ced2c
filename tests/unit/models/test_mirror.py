"""The copy that follows a network in training: always the network's own logits, whatever moved in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.models.mirror import Mirror
from robustflat.models.preact_resnet import preact_resnet18
from robustflat.models.resnet import resnet_tiny
from robustflat.models.small import mlp


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def move(model: nn.Module) -> None:
    """One step in train mode: statistics, weights, biases, scales and shifts all change."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(images(8)).logsumexp(dim=1).sum().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("norm", ["bn", "rebn", "fixedbn", "gn"])
def test_refreshed_copy_gives_the_moved_networks_logits_and_gradients(norm: str) -> None:
    model = resnet_tiny(classes=3, in_channels=1, channels=4, norm=norm).double().eval()
    mirror = Mirror(model, images(2))
    for _ in range(3):
        move(model)
        x, y = images().requires_grad_(), images().requires_grad_()
        copy = mirror.refreshed()
        torch.testing.assert_close(copy(x), model(y), rtol=1e-10, atol=1e-10)
        (ours,) = torch.autograd.grad(copy(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(model(y).square().sum(), y)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_network_without_batch_norm_and_with_views_is_followed() -> None:
    model = mlp(classes=3, in_channels=1, image_size=8, units=[6], norm="none").double().eval()
    mirror = Mirror(model, images(2))
    move(model)
    torch.testing.assert_close(mirror.refreshed()(images()), model(images()), rtol=1e-12, atol=1e-12)


def test_half_precision_copy_follows_within_its_rounding() -> None:
    model = resnet_tiny(classes=3, in_channels=1, channels=4).double().eval()
    mirror = Mirror(model.float(), images(2).float(), precision="bf16")
    move(model.double())  # double() and back: `Module.double` replaces no parameter objects
    x = images().float()
    plain = model.float()(x)
    assert (mirror.refreshed()(x) - plain).abs().max() < 0.05 * plain.abs().max()


def test_refreshing_leaves_the_network_alone() -> None:
    model = resnet_tiny(classes=3, in_channels=1, channels=4).double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = Mirror(model, images(2)).refreshed()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in copy.parameters())


def test_what_goes_around_a_batch_norm_too_is_not_folded_into_it() -> None:
    """Untrained batch norm hardly differs from the identity, so that the first logits cannot tell."""
    model = preact_resnet18(classes=3, in_channels=1, channels=4).eval()
    x = torch.rand(4, 1, 8, 8)
    mirror = Mirror(model, x[:2])
    assert ("body.blocks.0.conv1", "body.blocks.0.norm2") in mirror.copy.folds
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 3.0)
    torch.testing.assert_close(mirror.refreshed()(x), model(x), rtol=1e-4, atol=1e-5)
