"""A small ConvNeXt (Liu et al. 2022) for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.models.classifier import Classifier
from robustflat.models.initialize import Initialization
from robustflat.models.layers import Layers
from robustflat.models.normalize import Normalize


class ConvNextBlock(nn.Module):
    """x + linear(act(linear(norm(depthwise conv7x7(x))))), linear maps per pixel, to 4 widths and back.

    Unlike the original there is no learnable scale of the branch, so that every weight outside of the norm
    layers is one of a convolution.

    Args:
        width: channels before and after.
        layers: normalisation, activation, dropout (before the second linear map).
    """

    def __init__(self, width: int, *, layers: Layers) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = layers.make_norm(width)
        self.expand = nn.Conv2d(width, 4 * width, 1)
        self.activation = layers.make_activation()
        self.dropout = layers.make_dropout()
        self.reduce = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape."""
        out = self.activation(self.expand(self.norm(self.spatial(x))))
        result: Tensor = x + self.reduce(self.dropout(out))
        return result


def convnext(
    *,
    classes: int,
    in_channels: int = 3,
    channels: int = 64,
    depths: Sequence[int] = (2, 2, 4),
    norm: str = "ln",
    activation: str = "gelu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """ConvNeXt for 32x32 images: 2x2 patches, then stages that halve the size and double the channels.

    The smallest image is 2^(number of stages) pixels wide: 8 by default.

    Args:
        classes: K >= 2.
        in_channels: channels of the images.
        channels: width of the first stage.
        depths: number of blocks of each stage, each >= 1.
        norm, activation, auxiliary, mean, std: as in `resnet.resnet18`.
        dropout: probability in [0, 1) inside each block.
        initialization: `None`: `Initialization(fan="in", gain=1.0)`.

    Raises:
        UserError: for a value outside what is said above.
    """
    if len(depths) == 0:
        raise UserError("depths needs at least one stage, got none.")
    for name, value in (("in_channels", in_channels), ("channels", channels), ("depths", min(depths))):
        require_range(name, value, low=1)
    layers = Layers(norm, activation, dropout)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = in_channels
    for stage, depth in enumerate(depths):
        width = channels * 2**stage
        before = [] if stage == 0 else [layers.make_norm(inputs)]
        after = [layers.make_norm(width)] if stage == 0 else []
        parts[f"reduce{stage}"] = nn.Sequential(*before, nn.Conv2d(inputs, width, 2, stride=2), *after)
        parts[f"stage{stage}"] = nn.Sequential(*[ConvNextBlock(width, layers=layers) for _ in range(depth)])
        inputs = width
    parts["norm"] = layers.make_norm(inputs)
    parts["pool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=nn.Sequential(parts),
        width=inputs,
        classes=classes,
        auxiliary=auxiliary,
    )
    (initialization or Initialization(fan="in", gain=1.0))(model, activation)
    return model
