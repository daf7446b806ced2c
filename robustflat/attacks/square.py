"""Square: random search by squares of changed pixels; it sees scores only, no gradients.

Sources: Andriushchenko, Croce, Flammarion and Hein, "Square attack", ECCV 2020 (L-infinity, L2); Croce and Hein,
"Mind the box", ICML 2021 (L1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustflat.attacks.hunt import FILL, Confirm, Hunted, Pack, Record, begin, nothing_hunted
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import held_still, judge, succeeded
from robustflat.attacks.objectives import margin, objective_by_name
from robustflat.attacks.square_proposals import Draws, Proposal, apply_, draw, first_pattern
from robustflat.errors import require_range
from robustflat.geometry.input_ball import InputBall
from robustflat.types import Forward, Found, Objective

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

    Windows are shared by the examples of a batch; signs are not. Where few examples are left, several proposals
    are evaluated in one forward pass, each as if those before it were rejected, as nearly all are; what follows an
    accepted one is evaluated again. The result is that of one after another.

    Args:
        ball: the allowed images around each x.
        queries: proposals per run, >= 1.
        p_init: share of the pixels in the first window, in (0, 1].
        restarts: runs, >= 1.
        objective: what is maximised where the call gives no objective; a name of `objectives.OBJECTIVES`.
        stop_when_fooled: an example leaves the search soon after it is misclassified, at most 10 queries later.
        fill: images that proposals tried ahead may fill a forward pass to, >= 1; 1 tries none ahead (as for a
            model whose queries cost something).

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
        fill: int = FILL,
    ) -> None:
        require_range("fill", fill, low=1)
        require_range("queries", queries, low=1)
        require_range("p_init", p_init, low=0.0, high=1.0, low_open=True)
        require_range("restarts", restarts, low=1)
        self.ball = ball
        self.queries = queries
        self.p_init = p_init
        self.restarts = restarts
        self.objective = objective_by_name(objective)
        self.stop_when_fooled = stop_when_fooled
        self.fill = fill

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
            Found: the image with the largest objective, or a misclassified one if `stop_when_fooled`.

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
            draws = Draws(x, generator)
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

    def _run(self, forward: Forward, run: _Walk, goal: Objective, record: Record, draws: Draws) -> _Walk:
        """Proposals in their order; those that do not raise the objective are not taken."""
        start = Proposal.nothing(run.x)
        done = 0
        while done < self.queries:
            looked = done
            due = min(looked + _LOOK_EVERY - looked % _LOOK_EVERY, self.queries)
            while done < due:
                count = min(_even(due - done, max(self.fill // len(run.rows), 1)), due - done)
                proposals = [
                    draw(self.ball, run.x, self._side(query, run.x), draws) if query else start
                    for query in range(done, done + count)
                ]
                self._try(forward, run, goal, proposals)
                done += count
            record.spend(run, done - looked)
            if self.stop_when_fooled and goal is margin:  # a positive margin is never given up again
                run.catch(run.point, (run.value > 0) & run.value.isfinite())
            run = record.settle(run)
            if len(run.rows) == 0:
                break
        return run

    def _try(self, forward: Forward, run: _Walk, goal: Objective, proposals: Sequence[Proposal]) -> None:
        """Bring every example past all proposals: each round as far as its first accepted one."""
        count = len(proposals)
        number = torch.arange(count, device=run.x.device).unsqueeze(1)
        following = torch.zeros_like(run.rows)  # the next proposal of each example
        while True:
            tried = number >= following  # (count, B)
            points, which = self._candidates(run, proposals, tried)
            logits = forward(points)
            values = torch.full_like(run.value, -torch.inf).repeat(count, 1)
            values[tried] = goal(logits, run.y[which]).to(values.dtype)
            better = values > run.value
            accepted, first = better.any(dim=0), better.int().argmax(dim=0)
            last = torch.where(accepted, first, count - 1)
            place = (tried.flatten().cumsum(0) - 1).view_as(tried)  # where a candidate stands in `points`
            if self.stop_when_fooled and goal is not margin:
                wrong = succeeded(logits, run.y[which])
                fooled = torch.zeros_like(tried).masked_scatter_(tried, wrong) & (number <= last)
                latest = (fooled * (number + 1)).argmax(dim=0, keepdim=True)
                run.catch(points[place.gather(0, latest)[0]], fooled.any(dim=0))
            rows = accepted.nonzero().flatten()
            run.point[rows] = points[place[first[rows], rows]]
            run.value[rows] = values[first[rows], rows]
            following = last + 1
            if count == 1 or len(rows) == 0 or bool((following[rows] == count).all()):
                return

    def _candidates(self, run: _Walk, proposals: Sequence[Proposal], tried: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the proposals that are tried, bool (count, B), in its order; and whose they are."""
        if len(proposals) == 1 or bool(tried.all()):
            count = len(proposals)
            points = run.point.repeat(count, 1, 1, 1)
            for proposal, part in zip(proposals, points.chunk(count), strict=True):
                apply_(proposal, self.ball, part, run.x)
            return points, torch.arange(len(run.rows), device=run.x.device).repeat(count)
        which = tried.nonzero()[:, 1]
        points, x = run.point[which], run.x[which]
        sizes = tried.sum(dim=1).tolist()
        for proposal, rows, part, centre in zip(
            proposals, *(torch.split(part, sizes) for part in (which, points, x)), strict=True
        ):
            if len(rows):
                apply_(proposal.take(rows), self.ball, part, centre)
        return points, which

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


def _even(count: int, most: int) -> int:
    """Size of equal parts of `count`, none larger than `most`."""
    return -(-count // -(-count // most))
