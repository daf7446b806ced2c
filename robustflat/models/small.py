"""Small networks for small images: LeNet and multi-layer perceptron, as in the tests of the paper's code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from robustflat.errors import UserError, require_range
from robustflat.models.classifier import Classifier
from robustflat.models.initialize import Initialization
from robustflat.models.layers import Layers
from robustflat.models.normalize import Normalize


def lenet(
    *,
    classes: int,
    in_channels: int = 1,
    image_size: int = 28,
    channels: int = 64,
    hidden: int = 1024,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """Convolutions with pooling, doubling the channels while the size can be halved, then one hidden layer.

    Each stage is conv5x5, norm, activation, max pooling by 2. Stages are added while the size is even and its
    half is at least 3: sizes 28, 14 -> 7; 32, 16, 8 -> 4; 8 -> 4. At least one stage is needed.

    Args:
        classes: K >= 2.
        in_channels, image_size: images are (B, in_channels, image_size, image_size).
        channels: of the first stage.
        hidden: units of the fully connected layer; 0: none.
        norm, activation, mean, std, initialization: as in `resnet.resnet18`.
        dropout: probability in [0, 1) before the last layer.

    Raises:
        UserError: for an image_size that cannot be halved once, or another value outside what is said above.
    """
    layers = Layers(norm, activation, dropout)
    for name, value, low in (("in_channels", in_channels, 1), ("channels", channels, 1), ("hidden", hidden, 0)):
        require_range(name, value, low=low)
    if image_size % 2 or image_size < 6:
        raise UserError(f"lenet needs an even image_size >= 6, got {image_size}. Use resnet18 or mlp instead.")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    size, inputs, width = image_size, in_channels, channels
    while size % 2 == 0 and size >= 6:
        parts[f"stage{len(parts)}"] = _stage(inputs, width, layers)
        size, inputs, width = size // 2, width, 2 * width
    parts["flatten"] = nn.Flatten()
    features = inputs * size * size
    if hidden:
        parts["hidden"] = nn.Linear(features, hidden)
        parts["activation"] = layers.make_activation()
        features = hidden
    parts["dropout"] = layers.make_dropout()
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=nn.Sequential(parts),
        width=features,
        classes=classes,
        image_shape=(in_channels, image_size, image_size),
    )
    (initialization or Initialization(fan="in"))(model, activation)
    return model


def mlp(
    *,
    classes: int,
    in_channels: int = 1,
    image_size: int = 28,
    units: Sequence[int] = (64, 64, 64),
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """Multi-layer perceptron: per layer linear, activation, norm (in this order), dropout.

    Args:
        classes: K >= 2.
        in_channels, image_size: images are (B, in_channels, image_size, image_size).
        units: width of each hidden layer; empty: a linear classifier.
        norm, activation, mean, std, initialization: as in `resnet.resnet18`.
        dropout: probability in [0, 1) after each hidden layer.

    Raises:
        UserError: for a value outside what is said above.
    """
    layers = Layers(norm, activation, dropout)
    require_range("in_channels", in_channels, low=1)
    require_range("image_size", image_size, low=1)
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = in_channels * image_size * image_size
    for index, width in enumerate(units):
        require_range(f"units[{index}]", width, low=1)
        parts[f"linear{index}"] = nn.Linear(inputs, width)
        parts[f"activation{index}"] = layers.make_activation()
        parts[f"norm{index}"] = layers.make_flat_norm(width)
        parts[f"dropout{index}"] = layers.make_dropout()
        inputs = width
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=nn.Sequential(parts),
        width=inputs,
        classes=classes,
        image_shape=(in_channels, image_size, image_size),
    )
    (initialization or Initialization(fan="in"))(model, activation)
    return model


def _stage(inputs: int, width: int, layers: Layers) -> nn.Sequential:
    parts = OrderedDict(
        conv=nn.Conv2d(inputs, width, 5, padding=2),
        norm=layers.make_norm(width),
        activation=layers.make_activation(),
        pool=nn.MaxPool2d(2),
    )
    return nn.Sequential(parts)
