"""Activation functions by name, and the gain that each wants at initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.errors import require_one_of


class SigmoidGelu(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that the paper prints (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x * torch.sigmoid(1.702 * x)


_SQRT2, _TANH = math.sqrt(2.0), 5.0 / 3.0
_ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, _SQRT2),
    "silu": (nn.SiLU, _SQRT2),
    "swish": (nn.SiLU, _SQRT2),
    "mish": (nn.Mish, _SQRT2),
    "gelu": (nn.GELU, _SQRT2),
    "gelu_sigmoid": (SigmoidGelu, _SQRT2),
    "softplus": (nn.Softplus, _SQRT2),
    "leaky_relu": (lambda: nn.LeakyReLU(0.25), _SQRT2),
    "elu": (nn.ELU, _SQRT2),
    "tanh": (nn.Tanh, _TANH),
    "softsign": (nn.Softsign, _TANH),
    "sigmoid": (nn.Sigmoid, 1.0),
}

ACTIVATIONS = tuple(_ACTIVATIONS)
"""Names that `activation_layer` knows."""


def activation_layer(name: str) -> nn.Module:
    """Fresh layer of the activation called `name`; none works in place.

    Args:
        name: relu; silu or swish, x sigmoid(x); mish, x tanh(softplus(x)); gelu (exact, with erf);
            gelu_sigmoid, x sigmoid(1.702 x), as the paper prints it; softplus; leaky_relu (slope 0.25, as in
            the released code); elu; tanh; softsign; sigmoid.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    require_one_of("activation", name, ACTIVATIONS)
    return _ACTIVATIONS[name][0]()


def activation_gain(name: str) -> float:
    """Factor on the standard deviation of the weights before this activation, as in the released code.

    sqrt(2) for relu and its smooth relatives, 5/3 for tanh and softsign, 1 for sigmoid.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    require_one_of("activation", name, ACTIVATIONS)
    return _ACTIVATIONS[name][1]
