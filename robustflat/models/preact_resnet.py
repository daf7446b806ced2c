"""Pre-activation residual networks (He et al. 2016b); their block also makes wide residual networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from robustflat.errors import require_range
from robustflat.models.classifier import Classifier
from robustflat.models.initialize import Initialization
from robustflat.models.layers import Layers
from robustflat.models.normalize import Normalize


class PreactBlock(nn.Module):
    """conv3x3(act(norm(conv3x3(act(norm(x)))))) + shortcut.

    The shortcut is x itself; where the shape changes, a 1x1 convolution of act(norm(x)). Dropout comes before
    the second convolution. No convolution has a bias.

    Args:
        inputs, width: channels before and after.
        stride: of the first convolution and the shortcut.
        layers: normalisation, activation, dropout.
    """

    def __init__(self, inputs: int, width: int, *, stride: int, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.make_norm(inputs)
        self.activation1 = layers.make_activation()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm2 = layers.make_norm(width)
        self.activation2 = layers.make_activation()
        self.dropout = layers.make_dropout()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        activated = self.activation1(self.norm1(x))
        out = self.dropout(self.activation2(self.norm2(self.conv1(activated))))
        result: Tensor = self.conv2(out) + (x if self.shortcut is None else self.shortcut(activated))
        return result


def preact_body(
    in_channels: int, stem: int, widths: Sequence[int], depths: Sequence[int], layers: Layers
) -> nn.Sequential:
    """Convolution, stages of `PreactBlock`s, norm, activation, average: (B, C, H, W) -> (B, widths[-1]).

    Args:
        in_channels: channels of the images.
        stem: channels after the first convolution.
        widths, depths: channels and number of blocks of each stage; the second and later ones halve H and W.
        layers: normalisation, activation, dropout.

    Raises:
        UserError: if in_channels, stem, a width or a depth is < 1.
    """
    for name, value in (("in_channels", in_channels), ("channels", min(stem, *widths)), ("depth", min(depths))):
        require_range(name, value, low=1)
    blocks: list[nn.Module] = []
    inputs = stem
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for position in range(depth):
            stride = 2 if stage > 0 and position == 0 else 1
            blocks.append(PreactBlock(inputs, width, stride=stride, layers=layers))
            inputs = width
    parts = OrderedDict(
        stem=nn.Conv2d(in_channels, stem, 3, padding=1, bias=False),
        blocks=nn.Sequential(*blocks),
        norm=layers.make_norm(inputs),
        activation=layers.make_activation(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    return nn.Sequential(parts)


def preact_resnet18(
    *,
    classes: int,
    in_channels: int = 3,
    channels: int = 64,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """Pre-activation ResNet-18 for small images, as in work on overfitting and AWP (Rice, Wu et al. 2020).

    With 64 channels and 10 classes: 11,172,170 parameters. Arguments and errors as in `resnet.resnet18`.
    """
    layers = Layers(norm, activation, dropout)
    widths = tuple(channels * 2**stage for stage in range(4))
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=preact_body(in_channels, channels, widths, (2, 2, 2, 2), layers),
        width=widths[-1],
        classes=classes,
        auxiliary=auxiliary,
    )
    (initialization or Initialization())(model, activation)
    return model
