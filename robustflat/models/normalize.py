"""[0, 1] images -> standardised images: the first layer of every model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_range


class Normalize(nn.Module):
    """(x - mean_c) / std_c per channel c, inside the model, so that attacks and data stay in [0, 1].

    The constants are non-persistent buffers: they follow the model to its device and dtype, but are no part of
    its state dict, so checkpoints hold learned tensors and batch-norm statistics only.

    >>> layer = Normalize((0.5,), (0.25,))
    >>> float(layer(torch.ones(1, 1, 2, 2)).mean())
    2.0

    Args:
        mean, std: one number per channel, in [0, 1] units, std > 0; both `None`: images pass unchanged.
        channels: number of channels that images must have; `None`: taken from `mean`, or any number without it.

    Raises:
        UserError: if only one of mean and std is given, their lengths differ from each other or from
            `channels`, or a std is not positive; on a call, if the images have another number of channels or
            are no float (B, C, H, W) tensor. A call looks at shapes and dtypes only, so it never waits for the
            device.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, *, channels: int | None = None
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise UserError("mean and std belong together: give both, one number per channel, or neither.")
        self.channels = channels
        if mean is None or std is None:
            self.register_buffer("mean", None, persistent=False)
            self.register_buffer("std", None, persistent=False)
            return
        self.channels = len(mean) if channels is None else channels
        if not len(mean) == len(std) == self.channels:
            raise UserError(
                f"mean and std need one number per channel: got {len(mean)} and {len(std)} numbers "
                f"for {self.channels} channel(s)."
            )
        for value in std:
            require_range("std", value, low=0.0, low_open=True, hint="Give std in [0, 1] units.")
        self.register_buffer("mean", torch.tensor([float(m) for m in mean]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([float(s) for s in std]).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) in [0, 1] -> standardised images of the same shape and dtype."""
        self._check(x)
        if self.mean is None or self.std is None:
            return x
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or (self.channels is not None and x.shape[1] != self.channels):
            wanted = "C" if self.channels is None else str(self.channels)
            raise UserError(
                f"The model takes images of shape (B, {wanted}, H, W), got {tuple(x.shape)}. "
                "Do in_channels and mean of the model fit the data set?"
            )
        if not x.is_floating_point():
            raise UserError(f"The model takes float images in [0, 1], got {x.dtype}. Convert uint8 by x.float() / 255.")

    def extra_repr(self) -> str:
        """The constants, for `print(model)`."""
        if self.mean is None or self.std is None or self.mean.is_meta:
            return f"channels={self.channels}"
        mean, std = (", ".join(f"{v:.4g}" for v in b.flatten().tolist()) for b in (self.mean, self.std))
        return f"mean=({mean}), std=({std})"
