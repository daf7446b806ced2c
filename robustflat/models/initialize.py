"""How the weights of a new network are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.models.activations import activation_gain
from robustflat.models.norms import has_scale, zero_scale_

_FANS = ("in", "out")


@dataclass(frozen=True, kw_only=True)
class Initialization:
    """Normal weights with standard deviation scale * gain / sqrt(fan), zero biases (He et al. 2015).

    Normalisation layers keep what their constructors set; embeddings get standard deviation 0.02 * scale.
    Numbers are drawn on the CPU in float32, so one seed gives one network on every device.

    Args:
        scale: factor on every standard deviation, > 0.
        fan: "out" (default, as in the paper's code) or "in", for convolutions.
        linear_fan: the same for linear layers, by default "in".
        gain: `None`: the activation's own (`activation_gain`), for all layers including the last.
        seed: seed of a generator used for this network only; `None`: torch's global generator.

    Raises:
        UserError: for scale or gain <= 0, an unknown fan or a negative seed.
    """

    scale: float = 1.0
    fan: str = "out"
    linear_fan: str = "in"
    gain: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require_range("scale", self.scale, low=0.0, low_open=True)
        require_one_of("fan", self.fan, _FANS)
        require_one_of("linear_fan", self.linear_fan, _FANS)
        if self.gain is not None:
            require_range("gain", self.gain, low=0.0, low_open=True)
        if self.seed is not None:
            require_range("seed", self.seed, low=0)

    def __call__(self, network: nn.Module, activation: str) -> None:
        """Draw all weights of `network` in place, in the order of its modules.

        Args:
            network: its convolutions, linear layers and embeddings are drawn; on the meta device nothing is.
            activation: name of its activation, for the gain.

        Raises:
            UserError: for an unknown activation.
        """
        gain = activation_gain(activation) if self.gain is None else self.gain
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                convolution = isinstance(module, nn.Conv2d)
                fan = fan_of(module, self.fan if convolution else self.linear_fan)
                _draw_(module.weight, self.scale * gain / fan**0.5, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _draw_(module.weight, 0.02 * self.scale, generator)


def fan_of(module: nn.Conv2d | nn.Linear, kind: str) -> int:
    """Number of inputs that one output sums over (kind "in"), or of outputs that one input reaches ("out")."""
    outputs, inputs, *kernel = module.weight.shape
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    pixels = torch.Size(kernel).numel()
    return pixels * (inputs if kind == "in" else outputs // groups)


@runtime_checkable
class ResidualBlock(Protocol):
    """A block that ends its residual branch with a normalisation layer."""

    def last_norm(self) -> nn.Module:
        """The normalisation layer just before the branch is added to the shortcut."""
        ...


def zero_residuals_(network: nn.Module, norm: str, wanted: bool | None) -> None:
    """Start every residual branch at exactly 0, in place, so that blocks begin as their shortcuts.

    The released code sets the last norm's *weight* to 0, which does nothing for rebn (its scale is 1 + weight);
    here the *scale* is set to 0 for every norm that has one.

    Args:
        network: all its `ResidualBlock`s are changed.
        norm: name of the normalisation of the network.
        wanted: `None`: yes where `norm` has a learnable scale.

    Raises:
        UserError: if `wanted` is true and `norm` has no learnable scale.
    """
    if wanted and not has_scale(norm):
        raise UserError(
            f"zero_residuals=true needs a normalisation with a learnable scale, got norm={norm!r}. "
            "Use norm=bn, rebn, gn or ln, or zero_residuals=false."
        )
    if wanted is False or not has_scale(norm):
        return
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            zero_scale_(module.last_norm())


def _draw_(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    if weight.is_meta:
        return
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu").mul_(std))
