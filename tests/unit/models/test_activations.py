"""Activations: scalar formulas from the math module as oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from robustflat.errors import UserError
from robustflat.models.activations import ACTIVATIONS, activation_gain, activation_layer


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


FORMULAS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * math.tanh(_softplus(x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "softplus": _softplus,
    "leaky_relu": lambda x: x if x > 0 else 0.25 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "tanh": math.tanh,
    "softsign": lambda x: x / (1 + abs(x)),
    "sigmoid": _sigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_matches_its_formula_and_leaves_the_input_alone(name: str) -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    before = x.clone()
    expected = torch.tensor([FORMULAS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(activation_layer(name)(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "gain"), [("relu", 2**0.5), ("mish", 2**0.5), ("tanh", 5 / 3), ("sigmoid", 1.0)])
def test_gains_are_those_of_the_released_code(name: str, gain: float) -> None:
    assert activation_gain(name) == pytest.approx(gain)


@pytest.mark.parametrize("function", [activation_layer, activation_gain])
def test_unknown_name_is_refused_with_a_suggestion(function: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"activation must be one of .*got 'rleu'. Did you mean 'relu'?"):
        function("rleu")
