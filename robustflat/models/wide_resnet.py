"""Wide residual networks (Zagoruyko and Komodakis 2016), the large models of adversarial training."""

from __future__ import annotations

from collections.abc import Sequence

from robustflat.errors import UserError, require_range
from robustflat.models.classifier import Classifier
from robustflat.models.initialize import Initialization
from robustflat.models.layers import Layers
from robustflat.models.normalize import Normalize
from robustflat.models.preact_resnet import preact_body

_STEM = 16


def wide_resnet(
    *,
    depth: int,
    widen: int,
    classes: int,
    in_channels: int = 3,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """WRN-depth-widen: 3 stages of (depth - 4) / 6 pre-activation blocks, 16, 32 and 64 times `widen` channels.

    Args:
        depth: 6 n + 4 with n >= 1: 10, 16, 22, 28, 34, ..., 70.
        widen: k >= 1, factor on the channels.
        classes, in_channels, norm, activation, auxiliary, mean, std, initialization: as in `resnet.resnet18`.
        dropout: probability in [0, 1) before the second convolution of each block.

    Raises:
        UserError: for another depth (the message names the nearest), widen < 1, or as in `resnet18`.
    """
    if depth < 10 or (depth - 4) % 6:
        nearest = max(10, 6 * round((depth - 4) / 6) + 4)
        raise UserError(f"depth must be 6 n + 4 with n >= 1 (10, 16, 22, 28, ...), got {depth}. Use {nearest}.")
    require_range("widen", widen, low=1)
    layers = Layers(norm, activation, dropout)
    widths = tuple(_STEM * widen * 2**stage for stage in range(3))
    model = Classifier(
        normalize=Normalize(mean, std, channels=in_channels),
        body=preact_body(in_channels, _STEM, widths, [(depth - 4) // 6] * 3, layers),
        width=widths[-1],
        classes=classes,
        auxiliary=auxiliary,
    )
    (initialization or Initialization())(model, activation)
    return model


def wrn_28_10(
    *,
    classes: int,
    in_channels: int = 3,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """WRN-28-10: 36,479,194 parameters with 10 classes. Arguments and errors as in `wide_resnet`."""
    return wide_resnet(
        depth=28,
        widen=10,
        classes=classes,
        in_channels=in_channels,
        norm=norm,
        activation=activation,
        dropout=dropout,
        auxiliary=auxiliary,
        mean=mean,
        std=std,
        initialization=initialization,
    )


def wrn_34_10(
    *,
    classes: int,
    in_channels: int = 3,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """WRN-34-10: 46,160,474 parameters with 10 classes. Arguments and errors as in `wide_resnet`."""
    return wide_resnet(
        depth=34,
        widen=10,
        classes=classes,
        in_channels=in_channels,
        norm=norm,
        activation=activation,
        dropout=dropout,
        auxiliary=auxiliary,
        mean=mean,
        std=std,
        initialization=initialization,
    )


def wrn_34_20(
    *,
    classes: int,
    in_channels: int = 3,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """WRN-34-20: 184,531,674 parameters with 10 classes. Arguments and errors as in `wide_resnet`."""
    return wide_resnet(
        depth=34,
        widen=20,
        classes=classes,
        in_channels=in_channels,
        norm=norm,
        activation=activation,
        dropout=dropout,
        auxiliary=auxiliary,
        mean=mean,
        std=std,
        initialization=initialization,
    )


def wrn_70_16(
    *,
    classes: int,
    in_channels: int = 3,
    norm: str = "bn",
    activation: str = "relu",
    dropout: float = 0.0,
    auxiliary: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    initialization: Initialization | None = None,
) -> Classifier:
    """WRN-70-16: 266,796,506 parameters with 10 classes. Arguments and errors as in `wide_resnet`."""
    return wide_resnet(
        depth=70,
        widen=16,
        classes=classes,
        in_channels=in_channels,
        norm=norm,
        activation=activation,
        dropout=dropout,
        auxiliary=auxiliary,
        mean=mean,
        std=std,
        initialization=initialization,
    )
