"""Residual networks (He et al. 2016a) in the layout of the paper, for small images, and in that of ImageNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from robustflat.errors import require_one_of, require_range
from robustflat.models.classifier import Classifier
from robustflat.models.initialize import Initialization, zero_residuals_
from robustflat.models.layers import Layers
from robustflat.models.normalize import Normalize

STEMS = ("cifar", "imagenet")


class BasicBlock(nn.Module):
    """act(norm(conv3x3(act(norm(conv3x3(x))))) + shortcut(x)); dropout follows the second convolution.

    Args:
        inputs, width: channels before and after.
        stride: of the first convolution and the shortcut.
        layers: normalisation, activation, dropout.
        shortcut_bias: whether the shortcut's 1x1 convolution has a bias.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int, layers: Layers, shortcut_bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = layers.make_norm(width)
        self.activation1 = layers.make_activation()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.dropout = layers.make_dropout()
        self.norm2 = layers.make_norm(width)
        self.shortcut = _shortcut(inputs, width, stride, layers, shortcut_bias)
        self.activation2 = layers.make_activation()

    def last_norm(self) -> nn.Module:
        """The normalisation before the addition."""
        return self.norm2

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.activation1(self.norm1(self.conv1(x)))
        out = self.norm2(self.dropout(self.conv2(out)))
        result: Tensor = self.activation2(out + self.shortcut(x))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, each with norm, plus the shortcut.

    Args:
        inputs: channels before; after the block there are 4 * width.
        width: channels inside.
        stride: of the 3x3 convolution and the shortcut.
        layers: normalisation and activation; the block has no place for dropout.
        shortcut_bias: whether the shortcut's 1x1 convolution has a bias.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int, layers: Layers, shortcut_bias: bool) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = layers.make_norm(width)
        self.activation1 = layers.make_activation()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = layers.make_norm(width)
        self.activation2 = layers.make_activation()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = layers.make_norm(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, layers, shortcut_bias)
        self.activation3 = layers.make_activation()

    def last_norm(self) -> nn.Module:
        """The normalisation before the addition."""
        return self.norm3

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = self.activation1(self.norm1(self.conv1(x)))
        out = self.activation2(self.norm2(self.conv2(out)))
        result: Tensor = self.activation3(self.norm3(self.conv3(out)) + self.shortcut(x))
        return result


def resnet18(
    *,
    classes: int,
    in_channels: int = 3,
    channels: int = 64,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    zero_residuals: bool | None = None,
    stem: str = "cifar",
    auxiliary: bool | str = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """ResNet-18: 8 basic blocks in 4 stages; the paper's network with norm="rebn" and the data's mean and std.

    With the CIFAR stem and 64 channels, 10 classes: 11,174,922 parameters. Any image size from 8x8.

    Args:
        classes: K >= 2.
        in_channels: channels of the images.
        channels: width of the first stage; it doubles with every further stage.
        norm, activation: see `norms.norm_layer` and `activations.activation_layer`.
        dropout: probability in [0, 1) after the second convolution of each block.
        zero_residuals: start every residual branch at 0 (see `initialize.zero_residuals_`); `None`: yes where
            `norm` has a learnable scale. The released code does so for bn, but, by mistake, not for rebn.
        stem: "cifar": 3x3 convolution, and, as in the paper's code, biases in it and in the 1x1 convolutions of
            the shortcuts; "imagenet": 7x7 convolution of stride 2, max pooling, no biases in convolutions.
        auxiliary: build the rotation head of self-supervised training; see `Classifier`.
        mean, std: per channel in [0, 1] units; `None`: images are not standardised.
        initialization: `None`: `Initialization()`.

    Raises:
        UserError: for a value outside what is said above.
    """
    layers = Layers(norm, activation, dropout)
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=_body(BasicBlock, (2, 2, 2, 2), in_channels, channels, layers, stem),
        width=8 * channels,
        classes=classes,
        auxiliary=auxiliary,
    )
    return _initialized(model, layers, zero_residuals, initialization)


def resnet34(
    *,
    classes: int,
    in_channels: int = 3,
    channels: int = 64,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    zero_residuals: bool | None = None,
    stem: str = "cifar",
    auxiliary: bool | str = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """ResNet-34: 16 basic blocks in 4 stages. Arguments and errors as in `resnet18`."""
    layers = Layers(norm, activation, dropout)
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=_body(BasicBlock, (3, 4, 6, 3), in_channels, channels, layers, stem),
        width=8 * channels,
        classes=classes,
        auxiliary=auxiliary,
    )
    return _initialized(model, layers, zero_residuals, initialization)


def resnet50(
    *,
    classes: int,
    in_channels: int = 3,
    channels: int = 64,
    norm: str = "bn",
    activation: str = "relu",
    zero_residuals: bool | None = None,
    stem: str = "cifar",
    auxiliary: bool | str = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """ResNet-50: 16 bottleneck blocks in 4 stages, without dropout. Arguments and errors as in `resnet18`."""
    layers = Layers(norm, activation)
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=_body(Bottleneck, (3, 4, 6, 3), in_channels, channels, layers, stem),
        width=8 * channels * Bottleneck.expansion,
        classes=classes,
        auxiliary=auxiliary,
    )
    return _initialized(model, layers, zero_residuals, initialization)


def resnet_tiny(
    *,
    classes: int,
    in_channels: int = 1,
    channels: int = 16,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    zero_residuals: bool = False,
    auxiliary: bool | str = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """Residual network for 8x8 digits: one basic block in each of 2 stages, 19,754 parameters by default.

    Forward and backward pass of 128 such images take less than 10 ms on one CPU core. Arguments and errors as
    in `resnet18`, but residual branches do not start at 0: with so few blocks that costs capacity early on
    (30 epochs of PGD-7 training on digits, epsilon 0.15: robust error 0.19 instead of 0.28). The stem is the
    CIFAR one.
    """
    layers = Layers(norm, activation, dropout)
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=_body(BasicBlock, (1, 1), in_channels, channels, layers, "cifar"),
        width=2 * channels,
        classes=classes,
        auxiliary=auxiliary,
    )
    return _initialized(model, layers, zero_residuals, initialization)


def _body(
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    in_channels: int,
    channels: int,
    layers: Layers,
    stem: str,
) -> nn.Sequential:
    """Stem, stages and global average pooling: (B, in_channels, H, W) -> (B, features)."""
    require_one_of("stem", stem, STEMS)
    require_range("in_channels", in_channels, low=1)
    require_range("channels", channels, low=1)
    stages: list[nn.Module] = []
    inputs = channels
    for stage, depth in enumerate(depths):
        width = channels * 2**stage
        for position in range(depth):
            stride = 2 if stage > 0 and position == 0 else 1
            stages.append(block(inputs, width, stride=stride, layers=layers, shortcut_bias=stem == "cifar"))
            inputs = width * block.expansion
    parts = OrderedDict(
        stem=_stem(stem, in_channels, channels, layers),
        blocks=nn.Sequential(*stages),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    return nn.Sequential(parts)


def _stem(stem: str, in_channels: int, channels: int, layers: Layers) -> nn.Sequential:
    cifar = stem == "cifar"
    conv = (
        nn.Conv2d(in_channels, channels, 3, padding=1)
        if cifar
        else nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
    )
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=conv, norm=layers.make_norm(channels), activation=layers.make_activation()
    )
    if not cifar:
        parts["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(parts)


def _shortcut(inputs: int, outputs: int, stride: int, layers: Layers, bias: bool) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
    return nn.Sequential(OrderedDict(conv=conv, norm=layers.make_norm(outputs)))


def _initialized(
    model: Classifier, layers: Layers, zero_residuals: bool | None, initialization: Initialization | None
) -> Classifier:
    (initialization or Initialization())(model, layers.activation)
    zero_residuals_(model, layers.norm, zero_residuals)
    return model
