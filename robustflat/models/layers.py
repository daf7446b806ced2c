"""What every block of a network is made of: its normalisation, activation and dropout, chosen once by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robustflat.errors import require_one_of, require_range
from robustflat.models.activations import ACTIVATIONS, activation_layer
from robustflat.models.norms import NORMS, flat_norm_layer, norm_layer


@dataclass(frozen=True)
class Layers:
    """The choices that all blocks of a network share.

    Args:
        norm: see `robustflat.models.norms.norm_layer`.
        activation: see `robustflat.models.activations.activation_layer`.
        dropout: probability in [0, 1) of setting a number to 0 inside a block that has a place for it.

    Raises:
        UserError: for an unknown name or a dropout outside [0, 1).
    """

    norm: str
    activation: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_one_of("norm", self.norm, NORMS)
        require_one_of("activation", self.activation, ACTIVATIONS)
        require_range("dropout", self.dropout, low=0.0, high=1.0, high_open=True)

    def make_norm(self, channels: int) -> nn.Module:
        """Fresh normalisation layer for (B, C, H, W)."""
        return norm_layer(self.norm, channels)

    def make_flat_norm(self, features: int) -> nn.Module:
        """Fresh normalisation layer for (B, D)."""
        return flat_norm_layer(self.norm, features)

    def make_activation(self) -> nn.Module:
        """Fresh activation layer."""
        return activation_layer(self.activation)

    def make_dropout(self) -> nn.Module:
        """Fresh dropout layer; nothing at all where dropout is 0."""
        return nn.Dropout(self.dropout) if self.dropout > 0 else nn.Identity()
