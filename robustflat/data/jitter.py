"""Random brightness, contrast, saturation and hue."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.data.colour_ops import blend, luma, shift_hue
from robustflat.data.draws import uniform
from robustflat.data.pixels import change_chosen, per_image, require_images
from robustflat.errors import require_range

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class JitterDraw(NamedTuple):
    """Factors (4, B): brightness, contrast, saturation, then hue's shift; order (B, 4): which is applied when."""

    factors: Tensor
    order: Tensor


class ColorJitter:
    """Change brightness, contrast, saturation and hue of each image, in an order random for each image.

    A strength s draws a factor uniformly from [max(0, 1 - s), 1 + s]; hue shifts by at most `hue` turns of the
    colour wheel. On grey images saturation and hue do nothing.

    Args:
        brightness, contrast, saturation: strengths >= 0; 0 switches one off.
        hue: in [0, 0.5].

    Raises:
        UserError: for a strength outside its range; when called, for images without 1 or 3 channels.
    """

    def __init__(
        self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
    ) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, strength in strengths.items():
            require_range(name, strength, low=0.0, high=float("inf"), high_open=True)
        require_range("hue", hue, low=0.0, high=0.5, hint="Half a turn of the colour wheel is the most there is.")
        self.intervals = [(max(0.0, 1 - strength), 1 + strength) for strength in strengths.values()]
        self.hue = hue

    def draw(self, x: Tensor, generator: torch.Generator) -> JitterDraw:
        """Factors and order for each image of x (B, C, H, W)."""
        shares = uniform((8, x.shape[0]), generator, x.device)
        ends = [*self.intervals, (-self.hue, self.hue)]
        factors = [low + (high - low) * share for (low, high), share in zip(ends, shares[:4], strict=True)]
        return JitterDraw(torch.stack(factors), shares[4:].T.argsort(1))

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Jitter images x (B, C, H, W), float in [0, 1], C = 1 or 3."""
        require_images(x, "ColorJitter", colours=True)
        factors, order = self.draw(x, generator)
        for chosen in order.unbind(1):
            x = self._step(x, factors, chosen)
        return x

    def _step(self, x: Tensor, factors: Tensor, chosen: Tensor) -> Tensor:
        """Apply to each image the adjustment numbered chosen (B,)."""
        grey = luma(x)
        mean = grey.mean((1, 2, 3), keepdim=True)
        target = torch.where(per_image(chosen == SATURATION), grey, torch.zeros_like(grey))
        target = torch.where(per_image(chosen == CONTRAST), mean, target)
        factor = factors.gather(0, chosen.unsqueeze(0)).squeeze(0)
        turning = chosen == HUE
        blended = blend(x, target, torch.where(turning, torch.ones_like(factor), factor))
        if self.hue == 0.0:
            return blended
        return change_chosen(blended, turning, shift_hue, factors[HUE])
