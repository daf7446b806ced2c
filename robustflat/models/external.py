"""Any network from elsewhere (torchvision, timm, one's own) behind our model contract."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.models.normalize import Normalize


class Wrapped(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> normalise -> `network` -> logits (B, K).

    >>> model = Wrapped(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), classes=3, channels=1)

    Args:
        network: standardised images -> logits. One that standardises by itself gets no mean and std here.
        classes: K >= 2, the number of logits of `network`.
        mean, std: per channel in [0, 1] units; `None`: images reach the network unchanged.
        channels: number of channels that images must have; `None`: that of `mean`, or any without it.

    Raises:
        UserError: as `Normalize` and for classes < 2; on a call, if the network returns no (B, K) tensor.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        classes: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        require_range("classes", classes, low=2)
        self.classes = classes
        self.image_shape: tuple[int, int, int] | None = None
        self.normalize = Normalize(mean, std, channels=channels)
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, K)."""
        logits: object = self.network(self.normalize(x))
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{type(self.network).__name__} must return one tensor of logits, got {type(logits).__name__}. "
                "Switch its auxiliary outputs off."
            )
        if logits.shape != (x.shape[0], self.classes):
            raise UserError(
                f"{type(self.network).__name__} returns shape {tuple(logits.shape)} for {x.shape[0]} images, "
                f"but classes={self.classes} asks for {(x.shape[0], self.classes)}. Build it for that number."
            )
        return logits
