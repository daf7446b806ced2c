"""Square: random search by squares of changed pixels; it sees scores only, no gradients.

Sources: Andriushchenko, Croce, Flammarion and Hein, "Square attack", ECCV 2020 (L-infinity, L2); Croce and Hein,
"Mind the box", ICML 2021 (L1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeAlias

import torch
from torch import Tensor

from robustflat.attacks.duals import project_l1
from robustflat.attacks.hunt import Confirm, Hunted, Pack, Record, begin, nothing_hunted
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import held_still, judge
from robustflat.attacks.objectives import margin, objective_by_name, predicted_wrong
from robustflat.errors import require_range
from robustflat.geometry.input_ball import InputBall
from robustflat.geometry.numerics import positive
from robustflat.types import Forward, Found, Objective

Window: TypeAlias = tuple[EllipsisType | slice, ...]
"""Index of a window of images."""

_LOOK_EVERY = 10

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which the share of changed pixels is halved, for a schedule of 10,000 queries."""


class Square:
    """Accepts a random change of one square window whenever it raises the objective, and so needs no gradient.

    The search starts at a pattern of full size and spends one forward pass (query) per proposal. The window's
    share of the image starts at `p_init` and is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000
    queries. L-infinity: vertical stripes of +-epsilon, then windows of +-epsilon, one sign per channel. L2: tiles of
    a peaked pattern, then a window receives such a pattern, added to what it holds, at the expense of a second
    window and of what is left of epsilon; clipping into the box frees norm for later proposals. L1: the same
    start, then a window receives equal changes of random sign in some channels, and ball and box are restored by
    projection (our variant of the published one, and no weaker in our comparison).

    Windows are shared by the examples of a batch; signs are not.

    Args:
        ball: the allowed images around each x.
        queries: proposals per run, >= 1.
        p_init: share of the pixels in the first window, in (0, 1].
        restarts: runs, >= 1.
        objective: what is maximised where the call gives no objective; a name of `objectives.OBJECTIVES`.
        stop_when_fooled: an example leaves the search at its first misclassified point.

    Raises:
        UserError: if a number is out of range or the objective unknown.
    """

    def __init__(
        self,
        ball: InputBall,
        *,
        queries: int = 5000,
        p_init: float = 0.8,
        restarts: int = 1,
        objective: str = "margin",
        stop_when_fooled: bool = False,
    ) -> None:
        require_range("queries", queries, low=1)
        require_range("p_init", p_init, low=0.0, high=1.0, low_open=True)
        require_range("restarts", restarts, low=1)
        self.ball = ball
        self.queries = queries
        self.p_init = p_init
        self.restarts = restarts
        self.objective = objective_by_name(objective)
        self.stop_when_fooled = stop_when_fooled

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Search around images x (B, C, H, W) in [0, 1] with labels y.

        Returns:
            Found: the image with the largest objective, or the first misclassified one if `stop_when_fooled`.

        Raises:
            UserError: if x or y have the wrong shape or type.
        """
        return self.hunt(forward, x, y, objective, generator).found

    @torch.no_grad()
    def hunt(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
        *,
        confirm: Confirm | None = None,
    ) -> Hunted:
        """Like a call, and says how many forward passes each example took; see `AutoPgd.hunt`."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_hunted(x)
        goal = objective or self.objective
        x, y = x.detach(), y.detach()
        with held_still(forward):
            record = begin(forward, x, y, self.ball, goal, confirm)
            draws = _Draws(x, generator)
            for _ in range(self.restarts):
                rows = record.open() if self.stop_when_fooled else torch.arange(len(x), device=x.device)
                if len(rows) == 0:
                    break
                run = _Walk(
                    rows=rows,
                    x=x[rows],
                    y=y[rows],
                    caught=x[rows],
                    fooled=torch.zeros_like(record.found.fooled[rows]),
                    point=first_pattern(self.ball, x[rows], draws),
                    value=torch.full_like(record.found.value[rows], -torch.inf),
                )
                run = self._run(forward, run, goal, record, draws)
                if len(run.rows):
                    self._close(forward, run, goal, record)
            return record.result(forward, goal)

    def _run(self, forward: Forward, run: _Walk, goal: Objective, record: Record, draws: _Draws) -> _Walk:
        """Proposals one after another; those that do not raise the objective are taken back."""
        looked = 0
        for done in range(1, self.queries + 1):
            undo: list[_Change] = []
            if done > 1:
                undo = list(propose(self.ball, run, self._side(done - 1, run.x), draws))
            logits = forward(run.point)
            value = goal(logits, run.y).to(run.value.dtype)
            if self.stop_when_fooled and goal is not margin:
                run.catch(run.point, predicted_wrong(logits, run.y) & logits.isfinite().all(dim=1))
            better = value > run.value
            run.value = torch.where(better, value, run.value)
            for change in undo:
                change.revert_(run.point, better)
            if done % _LOOK_EVERY == 0 or done == self.queries:
                record.spend(run, done - looked)
                looked = done
                if self.stop_when_fooled and goal is margin:  # a positive margin is never given up again
                    run.catch(run.point, (run.value > 0) & run.value.isfinite())
                run = record.settle(run)
                if len(run.rows) == 0:
                    break
        return run

    def _side(self, done: int, x: Tensor) -> int:
        """Side of the window after `done` queries; odd and at least 3 for L2, whose pattern has a centre."""
        height, width = x.shape[2:]
        share = self.p_init / 2 ** sum(done > bound for bound in _HALVINGS)
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        if self.ball.norm != "l2":
            return side
        return min(max(side + 1 - side % 2, 3), height, width)

    def _close(self, forward: Forward, run: _Walk, goal: Objective, record: Record) -> None:
        """Offer the last point of every example left in the run."""
        point = self.ball.project(run.point, run.x)
        new = judge(forward, point, run.y, goal)
        if record.confirm is not None:
            new = new._replace(fooled=new.fooled & record.confirm(point, run.y))
        record.offer(run.rows, new, "fooled" if self.stop_when_fooled else "best")


@dataclass
class _Walk(Pack):
    """State of a run: the best point so far, in which proposals are written, and its value."""

    point: Tensor
    value: Tensor


class _Change:
    """A window of images and what it held before a proposal.

    Args:
        images: (B, C, H, W).
        where: the window, as an index.
    """

    def __init__(self, images: Tensor, where: Window) -> None:
        self.where = where
        self.before = images[self.where].clone()

    def revert_(self, images: Tensor, keep: Tensor) -> None:
        """Bring back the old content, in place, but for the examples `keep`, bool (B,)."""
        new = images[self.where]
        images[self.where] = torch.where(keep.view(-1, 1, 1, 1), new, self.before)


class _Draws:
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


def first_pattern(ball: InputBall, x: Tensor, draws: _Draws) -> Tensor:
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


def propose(ball: InputBall, run: _Walk, side: int, draws: _Draws) -> Iterator[_Change]:
    """Write a random change into `run.point`; yields what it touches, as it was."""
    if ball.norm == "linf":
        return _propose_linf(ball, run, side, draws)
    return (_propose_l1 if ball.norm == "l1" else _propose_l2)(ball, run, side, draws)


def _propose_linf(ball: InputBall, run: _Walk, side: int, draws: _Draws) -> Iterator[_Change]:
    change = _Change(run.point, draws.window(run.x, side))
    yield change
    signs = draws.signs(run.x, *run.x.shape[:2], 1, 1)
    run.point[change.where] = (run.x[change.where] + ball.epsilon * signs).clamp_(ball.low, ball.high)


def _propose_l2(ball: InputBall, run: _Walk, side: int, draws: _Draws) -> Iterator[_Change]:
    """One window gets a pattern on top of what it holds, from the norm of a second, cleared one and the rest."""
    x, point = run.x, run.point
    channels = x.shape[1]
    first = _Change(point, draws.window(x, side))
    yield first
    second = _Change(point, draws.window(x, side))
    yield second
    centre, old = x[first.where], first.before - x[first.where]
    left = ball.epsilon**2 - (point - x).flatten(1).square().sum(dim=1).view(-1, 1, 1, 1)
    budget = left / channels + _squares(second.before - x[second.where])
    point[second.where] = x[second.where]
    budget = budget + _squares(point[first.where] - centre)  # without the overlap, which the second one counts
    pattern = peaks(side, draws.coin(), x) * draws.signs(x, *x.shape[:2], 1, 1)
    new = pattern + old / positive(_squares(old).sqrt())
    new = new * (budget.clamp_min(0).sqrt() / positive(_squares(new).sqrt()))
    point[first.where] = (centre + new).clamp_(ball.low, ball.high)


def _propose_l1(ball: InputBall, run: _Walk, side: int, draws: _Draws) -> Iterator[_Change]:
    """One window gets equal changes in some channels, more than the ball allows; then all is projected.

    The projection takes the surplus from every changed pixel alike, so small changes vanish and the
    perturbation becomes sparse, as good ones in L1 are. The surplus is between a tenth and the whole of epsilon.
    """
    x, point = run.x, run.point
    count, channels = x.shape[:2]
    whole = _Change(point, (...,))
    yield whole
    delta = point - x
    where, other = draws.window(x, side), draws.window(x, side)
    old = delta[where].clone()
    budget = _sizes(old) + _sizes(delta[other])
    left = ball.epsilon - delta.abs().flatten(1).sum(dim=1).view(-1, 1, 1, 1)
    delta[other] = 0
    surplus = ball.epsilon * 10 ** -draws.fraction()
    signs = draws.signs(x, count, channels, 1, 1, zeros=True)
    new = signs / side**2 + old / positive(_sizes(old))
    delta[where] = new * ((budget + (left + surplus) / channels) / positive(_sizes(new)))
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
    upper = side // 2
    halves = [_peak(upper, side), -_peak(side - upper, side)]
    pattern = torch.cat(halves)
    if transposed:
        pattern = pattern.t()
    pattern = pattern / positive(torch.linalg.vector_norm(pattern))
    return pattern.to(device=like.device, dtype=like.dtype)


def _peak(height: int, width: int) -> Tensor:
    farthest = max(height // 2, width // 2)
    terms = 1 / torch.arange(1, farthest + 2, dtype=torch.float64).square()
    tails = terms.flip(0).cumsum(0).flip(0)  # tails[d] = sum of 1 / j^2 for j = d + 1 .. farthest + 1
    rows, columns = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    return tails[torch.maximum(rows.unsqueeze(1), columns.unsqueeze(0))]
