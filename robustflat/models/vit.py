"""A small vision transformer (Dosovitskiy et al. 2021) for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.models.classifier import Classifier
from robustflat.models.initialize import Initialization
from robustflat.models.layers import Layers
from robustflat.models.normalize import Normalize


class Patches(nn.Module):
    """Cuts images into patches and adds a learned position to each: (B, C, H, W) -> (B, T, D).

    Args:
        in_channels: C.
        image_size: H = W, a multiple of `patch`.
        patch: side of a patch in pixels.
        width: D.
    """

    def __init__(self, in_channels: int, *, image_size: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.position = nn.Embedding((image_size // patch) ** 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, T, D), T = (H / patch)^2."""
        tokens: Tensor = self.project(x).flatten(2).transpose(1, 2)
        return tokens + self.position.weight


class Attention(nn.Module):
    """Softmax attention over tokens with several heads (Vaswani et al. 2017).

    Written out, because torch's fused kernel has no second derivative on the CPU, which Hessians need.

    Args:
        width: D, a multiple of `heads`.
        heads: number of heads h.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> the same shape."""
        batch, tokens, width = x.shape
        parts = self.inputs(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, T, D / h)
        scores = query @ key.transpose(-2, -1) / (width // self.heads) ** 0.5  # (B, h, T, T)
        mixed = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        result: Tensor = self.output(mixed)
        return result


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + linear(act(linear(norm(x)))), hidden width 4 D.

    Args:
        width: D.
        heads: of the attention.
        layers: activation and dropout (at the end of both branches).
    """

    def __init__(self, width: int, *, heads: int, layers: Layers) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads)
        self.dropout1 = layers.make_dropout()
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.activation = layers.make_activation()
        self.reduce = nn.Linear(4 * width, width)
        self.dropout2 = layers.make_dropout()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> the same shape."""
        x = x + self.dropout1(self.attention(self.norm1(x)))
        out = self.reduce(self.activation(self.expand(self.norm2(x))))
        result: Tensor = x + self.dropout2(out)
        return result


class TokenMean(nn.Module):
    """Mean over tokens: (B, T, D) -> (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> (B, D)."""
        return x.mean(dim=1)


def vit(
    *,
    classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    heads: int = 3,
    activation: str = "gelu",
    dropout: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """Vision transformer with layer norm before each branch; the features are the mean over all patches.

    Args:
        classes: K >= 2.
        in_channels, image_size: images are (B, in_channels, image_size, image_size).
        patch: side of a patch in pixels; divides image_size.
        width: numbers per patch; a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        activation, mean, std: as in `resnet.resnet18`.
        dropout: probability in [0, 1) at the end of both branches of each block.
        initialization: `None`: `Initialization(fan="in", gain=1.0)`.

    Raises:
        UserError: for a value outside what is said above.
    """
    for name, value in (("in_channels", in_channels), ("patch", patch), ("depth", depth), ("heads", heads)):
        require_range(name, value, low=1)
    if image_size < patch or image_size % patch:
        raise UserError(f"patch must divide image_size, got patch={patch} and image_size={image_size}.")
    if width < heads or width % heads:
        raise UserError(f"heads must divide width, got heads={heads} and width={width}.")
    layers = Layers("none", activation, dropout)
    blocks = [TransformerBlock(width, heads=heads, layers=layers) for _ in range(depth)]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        patches=Patches(in_channels, image_size=image_size, patch=patch, width=width),
        blocks=nn.Sequential(*blocks),
        norm=nn.LayerNorm(width),
        mean=TokenMean(),
    )
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=nn.Sequential(parts),
        width=width,
        classes=classes,
        image_shape=(in_channels, image_size, image_size),
    )
    (initialization or Initialization(fan="in", gain=1.0))(model, activation)
    return model
