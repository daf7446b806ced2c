"""The copy that follows a network in training: always the network's own logits, whatever moved in between."""

from __future__ import annotations

import copy
import gc
import weakref

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
        copied = mirror.refreshed()
        torch.testing.assert_close(copied(x), model(y), rtol=1e-10, atol=1e-10)
        (ours,) = torch.autograd.grad(copied(x).square().sum(), x)
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
    copied = Mirror(model, images(2)).refreshed()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in copied.parameters())


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


class Named(nn.Module):
    """Weights, a buffer, a plain tensor, a number and a function that users replace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.second = nn.Linear(4, 3)
        self.second.weight = self.head.weight
        self.register_buffer("scale", torch.ones(4, 1, 1))
        self.offset, self.factor, self.function, self.calls = torch.zeros(4, 1, 1), 1.0, torch.relu, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        features = self.function(self.norm(self.conv(x)) / self.scale + self.offset) * self.factor
        logits: torch.Tensor = self.head(features.mean((2, 3))) + self.second(features.amax((2, 3)))
        return logits


REPLACED = {
    "parameter": lambda m: setattr(m.head, "bias", nn.Parameter(torch.rand(3).double())),
    "folded parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.rand(4, 1, 3, 3).double())),
    "state": lambda m: m.norm.load_state_dict({k: t * t for k, t in m.norm.state_dict().items()}, assign=True),
    "buffer": lambda m: setattr(m, "scale", torch.full((4, 1, 1), 2.0).double()),
}
CHANGED = {
    "layer": lambda m: setattr(m, "norm", nn.BatchNorm2d(4, eps=1.0).double().eval()),
    "shape": lambda m: setattr(m.head, "bias", None),
    "type": lambda m: m.float(),
    "number": lambda m: setattr(m, "factor", 2.0),
    "number of a layer": lambda m: setattr(m.norm, "eps", 1.0),
    "function": lambda m: setattr(m, "function", torch.tanh),
    "tensor": lambda m: setattr(m, "offset", torch.ones(4, 1, 1)),
    "tensor in place": lambda m: m.offset.add_(1),
    "weights that were shared": lambda m: setattr(m.second, "weight", nn.Parameter(torch.rand(3, 4).double())),
    "hook": lambda m: m.conv.register_forward_hook(lambda layer, taken, given: -given),
    "forward": lambda m: setattr(m.conv, "forward", torch.zeros_like),
}


@pytest.mark.parametrize("what", [*REPLACED, *CHANGED])
def test_what_is_replaced_is_followed_or_noticed(what: str) -> None:
    torch.manual_seed(0)
    model = Named().double().eval()
    mirror = Mirror(model, images(2))
    for _ in range(2):  # its calls are counted, but they are no setting
        move(model)
        assert mirror.follows(model)
    (REPLACED | CHANGED)[what](model)
    assert mirror.follows(model) is (what in REPLACED)
    if what in REPLACED:
        torch.testing.assert_close(mirror.refreshed()(images()), model(images()), rtol=1e-10, atol=1e-10)


def test_tensors_of_inference_mode_are_no_hindrance() -> None:
    model = Named().double().eval()
    with torch.inference_mode():
        model.offset = torch.ones(4, 1, 1, dtype=torch.float64)
    assert Mirror(model, images(2)).follows(model)


def test_it_follows_one_network_and_keeps_it_not_alive() -> None:
    model = Named().double().eval()
    mirror, gone = Mirror(model, images(2)), weakref.ref(model)
    assert not mirror.follows(copy.deepcopy(model))
    del model
    gc.collect()
    assert gone() is None
