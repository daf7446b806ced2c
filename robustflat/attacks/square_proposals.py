"""What Square draws at random: where a run starts, and the changes that it proposes one after another.

A proposal is drawn without a look at the search, so that several can be tried at once: see `square`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import EllipsisType
from typing import Self, TypeAlias

import torch
from torch import Tensor

from robustflat.attacks.duals import project_l1
from robustflat.geometry.input_ball import InputBall
from robustflat.geometry.numerics import positive

Window: TypeAlias = tuple[EllipsisType | slice, ...]
"""Index of a window of images."""


class Draws:
    """Random windows and signs. Windows are Python numbers, so that no proposal waits for the device.

    Args:
        x: images, for device and type.
        generator: source of everything; it is asked for one seed at once, and for the signs later.
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.device = x.device if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=self.device)
        self.windows = torch.Generator().manual_seed(int(seed))

    def window(self, x: Tensor, side: int) -> Window:
        """A window of the given side, as an index of images."""
        top, left = (int(torch.randint(size - side + 1, (), generator=self.windows)) for size in x.shape[2:])
        return ..., slice(top, top + side), slice(left, left + side)

    def coin(self) -> bool:
        """True or False."""
        return bool(torch.randint(2, (), generator=self.windows))

    def fraction(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.windows))

    def signs(self, x: Tensor, *shape: int, zeros: bool = False) -> Tensor:
        """+1 or -1, or with `zeros` also 0, equally likely, in the given shape and the type of x."""
        if zeros:
            drawn = torch.randint(3, shape, generator=self.generator, device=self.device) - 1
        else:
            drawn = 2 * torch.randint(2, shape, generator=self.generator, device=self.device) - 1
        return drawn.to(device=x.device, dtype=x.dtype)


def first_pattern(ball: InputBall, x: Tensor, draws: Draws) -> Tensor:
    """Where a run starts: stripes (L-infinity) or tiles of the peaked pattern, of full size, clipped."""
    count, channels, height, width = x.shape
    if ball.norm == "linf":
        return (x + ball.epsilon * draws.signs(x, count, channels, 1, width)).clamp_(ball.low, ball.high)
    side = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    pattern = peaks(side, draws.coin(), x)
    top, left = ((size - side * (size // side)) // 2 for size in (height, width))
    for i in range(height // side):
        for j in range(width // side):
            window = (..., slice(top + i * side, top + (i + 1) * side), slice(left + j * side, left + (j + 1) * side))
            delta[window] = pattern * draws.signs(x, count, channels, 1, 1)
    size = torch.linalg.vector_norm(delta.flatten(1), 1.0 if ball.norm == "l1" else 2.0, dim=1)
    delta = delta * (ball.epsilon / positive(size)).view(-1, 1, 1, 1)
    if ball.norm == "l1":
        centre = x.flatten(1)
        delta = project_l1(delta.flatten(1), centre, ball.epsilon, ball.low, ball.high).view_as(x)
    return (x + delta).clamp_(ball.low, ball.high)


@dataclass(frozen=True)
class Proposal:
    """A random change of images, whatever they are.

    Attributes:
        first, second: windows; in L-infinity there is one only.
        side: their side.
        signs: (B, C, 1, 1), for each example its own.
        coin: L2: whether the pattern is transposed.
        fraction: L1: where between a tenth and the whole of epsilon the surplus lies, in [0, 1).
    """

    first: Window
    second: Window
    side: int
    signs: Tensor
    coin: bool = False
    fraction: float = 0.0

    @classmethod
    def nothing(cls, x: Tensor) -> Self:
        """The proposal that leaves images like x as they are."""
        return cls((), (), 0, x[:, :, :1, :1])

    def take(self, rows: Tensor) -> Self:
        """The same change for some of the examples, int64 (M,)."""
        return replace(self, signs=self.signs[rows])


def draw(ball: InputBall, x: Tensor, side: int, draws: Draws) -> Proposal:
    """The next proposal for images like x (B, C, H, W), with windows of the given side."""
    shape = (*x.shape[:2], 1, 1)
    first = draws.window(x, side)
    if ball.norm == "linf":
        return Proposal(first, first, side, draws.signs(x, *shape))
    second = draws.window(x, side)
    if ball.norm == "l2":
        coin = draws.coin()
        return Proposal(first, second, side, draws.signs(x, *shape), coin=coin)
    fraction = draws.fraction()
    return Proposal(first, second, side, draws.signs(x, *shape, zeros=True), fraction=fraction)


def apply_(proposal: Proposal, ball: InputBall, point: Tensor, x: Tensor) -> None:
    """Change images `point` (B, C, H, W) around x in place."""
    if proposal.side == 0:
        return
    if ball.norm == "linf":
        where = proposal.first
        point[where] = (x[where] + ball.epsilon * proposal.signs).clamp_(ball.low, ball.high)
        return
    (_apply_l1_ if ball.norm == "l1" else _apply_l2_)(proposal, ball, point, x)


def _apply_l2_(proposal: Proposal, ball: InputBall, point: Tensor, x: Tensor) -> None:
    """One window gets a pattern on top of what it holds, from the norm of a second, cleared one and the rest."""
    first, second = proposal.first, proposal.second
    centre, old = x[first], point[first] - x[first]
    left = ball.epsilon**2 - (point - x).flatten(1).square().sum(dim=1).view(-1, 1, 1, 1)
    budget = left / x.shape[1] + _squares(point[second] - x[second])
    point[second] = x[second]
    budget = budget + _squares(point[first] - centre)  # without the overlap, which the second one counts
    pattern = peaks(proposal.side, proposal.coin, x) * proposal.signs
    new = pattern + old / positive(_squares(old).sqrt())
    new = new * (budget.clamp_min(0).sqrt() / positive(_squares(new).sqrt()))
    point[first] = (centre + new).clamp_(ball.low, ball.high)


def _apply_l1_(proposal: Proposal, ball: InputBall, point: Tensor, x: Tensor) -> None:
    """One window gets equal changes in some channels, more than the ball allows; then all is projected.

    The projection takes the surplus from every changed pixel alike, so small changes vanish and the
    perturbation becomes sparse, as good ones in L1 are. The surplus is between a tenth and the whole of epsilon.
    """
    where, other = proposal.first, proposal.second
    delta = point - x
    old = delta[where].clone()
    budget = _sizes(old) + _sizes(delta[other])
    left = ball.epsilon - delta.abs().flatten(1).sum(dim=1).view(-1, 1, 1, 1)
    delta[other] = 0
    surplus = ball.epsilon * 10**-proposal.fraction
    new = proposal.signs / proposal.side**2 + old / positive(_sizes(old))
    # Divided first: where a channel stays as it is, 0 times a huge number might not be a number.
    delta[where] = new / positive(_sizes(new)) * (budget + (left + surplus) / x.shape[1])
    centre = x.flatten(1)
    near = project_l1(delta.flatten(1), centre, ball.epsilon, ball.low, ball.high)
    point.copy_((centre + near).clamp_(ball.low, ball.high).view_as(x))


def _squares(delta: Tensor) -> Tensor:
    """Sum of squares over the window, (B, C, 1, 1)."""
    return delta.square().sum(dim=(2, 3), keepdim=True)


def _sizes(delta: Tensor) -> Tensor:
    """L1 norm of the window, (B, C, 1, 1)."""
    return delta.abs().sum(dim=(2, 3), keepdim=True)


def peaks(side: int, transposed: bool, like: Tensor) -> Tensor:
    """Pattern (side, side) of L2 norm 1: a positive peak beside a negative one.

    Each half is sum_{j = d + 1}^{n + 1} 1 / j^2 at distance d (larger of the two coordinates) from its centre.
    """
    pattern = _peaks(side)
    return (pattern.t() if transposed else pattern).to(device=like.device, dtype=like.dtype)


@cache
def _peaks(side: int) -> Tensor:
    upper = side // 2
    pattern = torch.cat([_peak(upper, side), -_peak(side - upper, side)])
    return pattern / positive(torch.linalg.vector_norm(pattern))


def _peak(height: int, width: int) -> Tensor:
    farthest = max(height // 2, width // 2)
    terms = 1 / torch.arange(1, farthest + 2, dtype=torch.float64).square()
    tails = terms.flip(0).cumsum(0).flip(0)  # tails[d] = sum of 1 / j^2 for j = d + 1 .. farthest + 1
    rows, columns = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    return tails[torch.maximum(rows.unsqueeze(1), columns.unsqueeze(0))]
