"""Normalisation layers by name: bn, fixedbn, rebn, gn, fixedgn, ln, none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustflat.errors import UserError, require_one_of, require_range

NORMS = ("bn", "fixedbn", "rebn", "gn", "fixedgn", "ln", "none")
"""Names that `norm_layer` knows."""

_GROUPS = (32, 24, 16, 8, 4, 2)


class ReBatchNorm(_BatchNorm):
    """Batch norm whose scale is 1 + weight, with weight and bias starting at 0 (name "rebn").

    Weight decay and weight clipping then pull the scale to 1 instead of 0 (used by the paper's baseline, and
    so named in its released code). Anything that folds this layer into a convolution must use `scale`,
    not `weight`. Takes (B, C) and (B, C, ...) tensors.

    Args:
        num_features: number of channels C.
    """

    is_normalization = True

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)

    @property
    def scale(self) -> Tensor:
        """Effective scale per channel, (C,): 1 + weight."""
        return 1 + self.weight

    def reset_parameters(self) -> None:
        """Running statistics to those of a standard normal input; weight and bias to 0, so scale to 1."""
        self.reset_running_stats()
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2

    def forward(self, input: Tensor) -> Tensor:
        """Features (B, C, ...) -> the same shape; statistics are kept as in torch's own batch norm."""
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # plain average over all batches, asked for by `swa_utils.update_bn`
                factor = 1.0 / float(self.num_batches_tracked)
        kept = self.track_running_stats or not self.training
        return F.batch_norm(
            input,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.scale,
            self.bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of each pixel of (B, C, H, W) features, as in ConvNeXt (Liu et al. 2022).

    Args:
        channels: number of channels C; weight and bias have shape (C,).
        eps: added to the variance.
    """

    is_normalization = True

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) -> the same shape, mean 0 and variance 1 over C before scale and shift."""
        pixels = x.permute(0, 2, 3, 1)
        pixels = F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, self.eps)
        return pixels.permute(0, 3, 1, 2)


def group_count(channels: int) -> int:
    """Groups of a group norm: first of 32, 24, 16, 8, 4, 2 that is <= channels / 2 and divides them, else 1."""
    return next((g for g in _GROUPS if 2 * g <= channels and channels % g == 0), 1)


def norm_layer(name: str, channels: int) -> nn.Module:
    """Normalisation layer for (B, C, H, W) features.

    Args:
        name: bn (batch norm), fixedbn (the same without scale and shift), rebn (scale 1 + weight), gn (group
            norm, see `group_count`), fixedgn (the same without scale and shift), ln (over channels), none.
        channels: number of channels C, >= 1.

    Raises:
        UserError: for an unknown name (with the nearest known one) or channels < 1.
    """
    require_one_of("norm", name, NORMS)
    require_range("channels", channels, low=1)
    if name in ("bn", "fixedbn"):
        return nn.BatchNorm2d(channels, affine=name == "bn")
    if name in ("gn", "fixedgn"):
        return nn.GroupNorm(group_count(channels), channels, affine=name == "gn")
    if name == "rebn":
        return ReBatchNorm(channels)
    return ChannelLayerNorm(channels) if name == "ln" else nn.Identity()


def flat_norm_layer(name: str, features: int) -> nn.Module:
    """Like `norm_layer`, for (B, D) features of a fully connected layer; ln is `torch.nn.LayerNorm`."""
    require_one_of("norm", name, NORMS)
    require_range("features", features, low=1)
    if name in ("bn", "fixedbn"):
        return nn.BatchNorm1d(features, affine=name == "bn")
    return nn.LayerNorm(features) if name == "ln" else norm_layer(name, features)


def has_scale(name: str) -> bool:
    """Whether the normalisation called `name` has a learnable scale."""
    require_one_of("norm", name, NORMS)
    return name not in ("fixedbn", "fixedgn", "none")


def zero_scale_(norm: nn.Module) -> None:
    """Set the effective scale of a normalisation layer to 0, in place (its output is then its shift).

    For `ReBatchNorm` that means weight = -1: a weight of 0, as in the released code, leaves the scale at 1.

    Raises:
        UserError: if the layer has no learnable scale.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise UserError(f"{type(norm).__name__} has no learnable scale that could be set to 0.")
    with torch.no_grad():
        weight.fill_(-1.0 if isinstance(norm, ReBatchNorm) else 0.0)
