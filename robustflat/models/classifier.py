"""The contract of all our models: [0, 1] images -> normalise -> body -> logits."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from robustflat.errors import UserError, require_one_of, require_range
from robustflat.models.normalize import Normalize

ROTATIONS = 4
"""Classes of the auxiliary task: rotation by 0, 90, 180, 270 degrees."""


class Classifier(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> logits (B, K).

    Parts, in order: `normalize`, `body` (images -> features), `head` (linear, features -> logits) and, if
    asked for, `auxiliary` (features -> rotation logits; marked by `is_auxiliary`, so that weight perturbations
    skip it).

    Args:
        normalize: first layer; also checks the number of channels.
        body: standardised images -> features (B, D).
        width: D, number of features.
        classes: K, number of classes, >= 2.
        image_shape: (C, H, W) that images must have; `None`: any H and W.
        auxiliary: whether to build the rotation head of self-supervised training (Hendrycks et al. 2019);
            "clamped": with its features cut to [0, 1], as in the paper's released code.

    Raises:
        UserError: if classes < 2; on a call, if the images' shape does not fit.
    """

    def __init__(
        self,
        *,
        normalize: Normalize,
        body: nn.Module,
        width: int,
        classes: int,
        image_shape: tuple[int, int, int] | None = None,
        auxiliary: bool | str = False,
    ) -> None:
        super().__init__()
        require_range("classes", classes, low=2)
        if isinstance(auxiliary, str):
            require_one_of("auxiliary", auxiliary, ("clamped",), hint="Or true for a head as the paper describes it.")
        self.classes = classes
        self.image_shape = image_shape
        self.normalize = normalize
        self.body = body
        self.head = nn.Linear(width, classes)
        self.auxiliary: nn.Module | None = rotation_head(width, clamp=auxiliary == "clamped") if auxiliary else None

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, D), the input of the last linear layer."""
        if self.image_shape is not None and tuple(x.shape[1:]) != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise UserError(
                f"The model was built for images of shape (B, {wanted}), got {tuple(x.shape)}. "
                "Do in_channels and image_size of the model fit the data set?"
            )
        features: Tensor = self.body(self.normalize(x))
        return features

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, K); with `auxiliary`, the pair (logits (B, K), rotation logits (B, 4)).

        Raises:
            UserError: if the rotation logits are asked for and the model has no rotation head.
        """
        features = self.features(x)
        logits: Tensor = self.head(features)
        if not auxiliary:
            return logits
        if self.auxiliary is None:
            raise UserError("The model has no rotation head. Build it with model.auxiliary=true.")
        return logits, self.auxiliary(features)


class RotationHead(nn.Sequential):
    """Features (B, D) -> rotation logits (B, 4); a module of its own type so that others can tell it apart."""

    is_auxiliary = True


def rotation_head(width: int, hidden: int = 256, *, clamp: bool = False) -> RotationHead:
    """Linear, ReLU, batch norm, linear, as in the paper's code but without its clamp of features to [0, 1].

    Args:
        width: number D of features.
        hidden: units of the hidden layer.
        clamp: with that clamp.
    """
    first: OrderedDict[str, nn.Module] = OrderedDict(clamp=nn.Hardtanh(0.0, 1.0)) if clamp else OrderedDict()
    return RotationHead(
        OrderedDict(
            **first,
            hidden=nn.Linear(width, hidden),
            activation=nn.ReLU(),
            norm=nn.BatchNorm1d(hidden),
            logits=nn.Linear(hidden, ROTATIONS),
        )
    )
