"""Folding on moved weights: the network's own logits and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustflat.models.folded import folded_forward, plain_forward
from robustflat.models.modes import perturbable
from robustflat.models.norms import ReBatchNorm
from robustflat.models.resnet import resnet_tiny


@pytest.fixture(params=["bn", "rebn"])
def network(request) -> nn.Module:
    torch.manual_seed(0)
    model = resnet_tiny(classes=3, in_channels=3, channels=4, norm=request.param, mean=[0.5] * 3, std=[0.2] * 3)
    for _ in range(3):
        model(torch.rand(16, 3, 8, 8))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def moved(model: nn.Module) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return {
        name: (w + 0.1 * torch.randn(w.shape, generator=draws, dtype=w.dtype)).requires_grad_()
        for name, w in perturbable(model).items()
    }


def test_logits_and_gradients_are_those_of_the_network_at_the_moved_weights(network):
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    found = []
    for forward in (plain_forward(network), folded_forward(network, x[:2])):
        weights, images = moved(network), x.clone().requires_grad_()
        logits = forward(weights, images)
        grads = torch.autograd.grad(logits.square().sum(), [*weights.values(), images])
        found.append([logits, *grads])
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(*found, strict=True))
    assert torch.allclose(found[0][0], functional_call(network, moved(network), (x,)))


@pytest.mark.parametrize("channels", [1, 3])
def test_first_order_loops_get_the_same_logits_and_gradients_in_channels_last_order(channels):
    torch.manual_seed(0)
    model = resnet_tiny(classes=3, in_channels=channels, channels=4, mean=[0.5] * channels, std=[0.2] * channels)
    x = torch.rand(5, channels, 8, 8, dtype=torch.float64)
    model.double()(x)
    found, seen = [], []
    for forward in (plain_forward(model.eval()), folded_forward(model, x[:2], first_order=True)):
        weights, images = moved(model), x.clone().requires_grad_()
        logits = forward(weights, images)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [*weights.values(), images])])
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(*found, strict=True))
    forward._network.body.blocks[0].register_forward_hook(lambda block, given, made: seen.append(made))
    forward(
        {
            n: w.detach().contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w.detach()
            for n, w in moved(model).items()
        },
        x,
    )
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(m.inplace for m in forward._network.modules() if type(m) is nn.ReLU)


class Reusing(nn.Module):
    """Needs the input of its ReLU again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.head((self.relu(z) * z.square()).mean((2, 3)))


def test_a_relu_whose_input_is_needed_again_does_not_overwrite_it():
    torch.manual_seed(0)
    model, x = Reusing().double().eval(), torch.rand(4, 2, 5, 5, dtype=torch.float64)
    weights = dict(model.named_parameters())
    found = []
    for forward in (plain_forward(model), folded_forward(model, x[:2], first_order=True)):
        logits = forward({n: weights[n] for n in ("conv.weight", "head.weight")}, x)
        found.append([logits, *torch.autograd.grad(logits.sum(), [weights["conv.weight"], weights["head.weight"]])])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_the_network_is_not_touched(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    forward = folded_forward(network.train(), torch.rand(2, 3, 8, 8, dtype=torch.float64))
    forward(moved(network), torch.rand(4, 3, 8, 8, dtype=torch.float64))
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_something_is_really_folded(network, monkeypatch):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    forward = folded_forward(network, x)
    plain = plain_forward(network)
    calls = []
    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "forward", lambda self, x: calls.append(1) or x)
    monkeypatch.setattr("robustflat.models.norms.ReBatchNorm.forward", lambda self, x: calls.append(1) or x)
    forward({}, x)
    assert not calls
    plain({}, x)
    assert calls


class Viewing(nn.Module):
    """Takes its images in one memory order only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).view(len(x), -1))


def test_a_network_that_needs_its_memory_order_is_taken_as_it_is():
    model, x = Viewing().eval(), torch.rand(4, 2, 6, 6)
    assert torch.equal(folded_forward(model, x)({}, x), model(x))


def test_a_network_without_batch_norm_is_taken_as_it_is():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), torch.rand(4, 2, 2, 2)
    weights = {"1.weight": torch.ones(2, 8)}
    assert torch.equal(folded_forward(model, x)(weights, x), functional_call(model, weights, (x,)))


@pytest.mark.parametrize("kind", ["torch", "rebn"])
def test_the_batch_norms_own_parameters_may_be_among_the_weights(kind: str) -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3) if kind == "torch" else ReBatchNorm(3)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), norm, torch.nn.Flatten(), torch.nn.Linear(12, 2)).double()
    model(torch.rand(8, 2, 4, 4, dtype=torch.float64))
    model.eval()
    x = torch.rand(5, 2, 4, 4, dtype=torch.float64)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    forward = folded_forward(model, x)
    ours, plain = forward(weights, x), torch.func.functional_call(model, weights, (x,))
    assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)
    for one, other in zip(
        *(torch.autograd.grad(z.square().sum(), list(weights.values())) for z in (ours, plain)), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    for alone in ("1.weight", "1.bias"):
        some = {alone: weights[alone]}
        assert torch.allclose(forward(some, x), torch.func.functional_call(model, some, (x,)), rtol=1e-10, atol=1e-12)


class _Instances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.other = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        logits: Tensor = self.second(y + self.other(y)).mean((2, 3))
        return logits


def test_gradients_of_instance_norm_are_right_for_a_single_image():
    torch.manual_seed(0)
    model, x = _Instances().eval(), torch.rand(1, 3, 6, 6, requires_grad=True)
    slopes = [
        torch.autograd.grad(forward({}, x).square().sum(), x)[0]
        for forward in (plain_forward(model), folded_forward(model, x.detach()))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)
