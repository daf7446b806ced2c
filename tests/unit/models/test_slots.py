"""Calls with other tensors as parameters: what torch's own `functional_call` computes, call after call."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustflat.models.slots import ParameterSlots


class Tied(nn.Module):
    """One parameter under two names, one of the network itself, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.second(self.first(x).tanh())


def test_outputs_and_gradients_are_those_of_functional_call() -> None:
    torch.manual_seed(0)
    model, x = Tied().double(), torch.rand(4, 3, dtype=torch.float64)
    private = copy.deepcopy(model).requires_grad_(False)
    slots = ParameterSlots(private)
    for names in (["gain"], ["first.weight", "second.bias"], ["gain", "first.weight", "first.bias"]):
        tensors = {n: torch.rand_like(p).requires_grad_() for n, p in model.named_parameters() if n in names}
        with slots.filled(tensors):
            ours = private(x)
        theirs = functional_call(model, tensors, (x,))
        assert torch.equal(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), [*tensors.values()]),
            torch.autograd.grad(theirs.sum(), [*tensors.values()]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        assert torch.equal(private(x), model(x))  # the network's own again


def test_the_own_parameters_come_back_after_an_error() -> None:
    model, x = Tied(), torch.rand(4, 3)
    expected = model(x)
    slots = ParameterSlots(model)
    try:
        with slots.filled({"gain": torch.zeros(3)}):
            raise RuntimeError
    except RuntimeError:
        assert torch.equal(model(x), expected)
    assert slots.own.keys() == {"gain", "first.weight", "first.bias", "second.weight", "second.bias"}
