"""FAB: fast adaptive boundary attack, which looks for the nearest misclassified image by itself.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustflat.attacks.autopgd import wrong_classes
from robustflat.attacks.duals import shortest_to_plane
from robustflat.attacks.hunt import (
    FILL,
    LOOK_EVERY,
    Confirm,
    Hunted,
    Pack,
    Record,
    begin,
    first_of_each,
    nothing_hunted,
)
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import choose, held_still, judge, require_values, succeeded
from robustflat.attacks.objectives import labels_of, margin
from robustflat.errors import require_range
from robustflat.geometry.input_ball import InputBall
from robustflat.geometry.numerics import normal, positive, uniform
from robustflat.types import Forward, Found, Objective

_REFINEMENTS = 3


class Closest(NamedTuple):
    """Nearest misclassified images found, (B, C, H, W), and their distances (B,): infinite where none was found."""

    x_adv: Tensor
    distance: Tensor


@dataclass
class _Boundary(Pack):
    """State of a search: classes (M, K') aimed at, current point, nearest misclassified one with its distance."""

    classes: Tensor
    point: Tensor
    best: Tensor
    distance: Tensor


class Fab:
    """Steps onto the linearised decision boundary, kept close to the original image, inside the box.

    Each step projects the current point and the original onto the linearised boundary intersected with the box
    (steps d and d_0 of least norm), overshoots by `eta` and mixes the two by
    a = min(|d| / (|d| + |d_0|), alpha_max):
    x <- (1 - a) (x + eta d) + a (x_0 + eta d_0). A misclassified point is compared with the nearest one so far,
    and the search goes on from x_0 + beta (x - x_0). Three false-position steps between x_0 and the nearest point
    found end each run. The projection is found by Newton's method on its dual, see `duals`. With
    `stop_when_fooled`, runs towards several targets share their passes where few examples are left; an example
    that one of them breaks leaves all.

    The objective of a call is only reported: FAB minimises a distance.

    Args:
        ball: fixes norm and box; its epsilon decides what counts as found.
        steps: steps per run, >= 1.
        restarts: runs, >= 1; the first starts at the image, the others at a random point around it.
        targets: one run towards the boundary of each of so many classes, the most probable wrong ones, at most
            K - 1; `None`: every step goes to the nearest of all boundaries, at K - 1 backward passes a step.
        eta: overshoot, >= 1.
        alpha_max: largest share of the original's projection, in [0, 1].
        beta: how much of the way back a misclassified point keeps, in (0, 1).
        stop_when_fooled: an example leaves the search once a misclassified point lies inside the ball.

    Raises:
        UserError: if a number is out of range.
    """

    def __init__(
        self,
        ball: InputBall,
        *,
        steps: int = 100,
        restarts: int = 1,
        targets: int | None = 9,
        eta: float = 1.05,
        alpha_max: float = 0.1,
        beta: float = 0.9,
        stop_when_fooled: bool = False,
    ) -> None:
        require_range("steps", steps, low=1)
        require_range("restarts", restarts, low=1)
        if targets is not None:
            require_range("targets", targets, low=1, hint="None goes to the nearest boundary of all.")
        require_range("eta", eta, low=1.0)
        require_range("alpha_max", alpha_max, low=0.0, high=1.0)
        require_range("beta", beta, low=0.0, high=1.0, low_open=True, high_open=True)
        self.ball = ball
        self.steps = steps
        self.restarts = restarts
        self.targets = targets
        self.eta = eta
        self.alpha_max = alpha_max
        self.beta = beta
        self.stop_when_fooled = stop_when_fooled
        self.objective: Objective = margin

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Search around images x (B, C, H, W) in [0, 1] with labels y (of probabilities the most probable counts).

        Returns:
            Found: the nearest misclassified image where it lies in the ball. Elsewhere that image brought into
            the ball, if it still fools the model or has a larger objective (default: margin) than x, else x.

        Raises:
            UserError: if x or y have the wrong shape or type, or the model cannot be differentiated.
        """
        return self.hunt(forward, x, y, objective, generator).found

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
        with torch.inference_mode(False), torch.enable_grad(), held_still(forward):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            record = begin(forward, x, y, self.ball, goal, confirm)
            closest = self._search(forward, x, y, record, generator)
            near = self.ball.project(closest.x_adv, x)
            new = judge(forward, near, y, goal)
            fooled = new.fooled if confirm is None else new.fooled & confirm(near, y)
            rows = (~record.found.fooled).nonzero().flatten()
            record.offer(rows, Found(near[rows], new.value[rows], fooled[rows]), "fooled")
            return record.result(forward, goal)

    def closest(self, forward: Forward, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Closest:
        """Nearest misclassified images, inside the ball or not; x itself where it is misclassified."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return Closest(x.clone(), x.new_zeros(0))
        with torch.inference_mode(False), torch.enable_grad(), held_still(forward):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            return self._search(forward, x, y, begin(forward, x, y, self.ball, margin, None), generator)

    def _search(
        self, forward: Forward, x: Tensor, y: Tensor, record: Record, generator: torch.Generator | None
    ) -> Closest:
        """All runs; where `stop_when_fooled`, what was found is written to the record, too."""
        classes = _classes(forward, x, y)
        wrong = record.found.fooled
        closest = Closest(x.clone(), torch.where(wrong, 0.0, torch.inf).to(x.dtype))
        targets = 1 if self.targets is None else min(self.targets, classes.shape[1])
        done = 0
        while done < targets:
            rows = record.open()
            if len(rows) == 0:
                break
            # A restart begins where the runs before it ended, so runs share passes only where there is none; the
            # nearest points of all lie on the boundary, and should be judged in passes like those of the caller.
            shared = self.stop_when_fooled and self.restarts == 1
            count = min(max(FILL // len(rows), 1), targets - done) if shared else 1
            for restart in range(self.restarts):
                rows = record.open() if restart else rows
                if len(rows) == 0:
                    return closest
                point = x[rows] if restart == 0 else self._start(x[rows], closest.distance[rows], generator)
                aims = classes[rows] if self.targets is None else _one_by_one(classes[rows, done : done + count])
                run = _boundary(rows.repeat(count), x, y, aims, point.repeat(count, 1, 1, 1), closest)
                self._run(forward, run, record, closest)
            done += count
        return closest

    def _run(self, forward: Forward, run: _Boundary, record: Record, closest: Closest) -> None:
        """Runs that share their passes; their nearest points replace farther ones in `closest`."""
        looked = 0
        for done in range(1, self.steps + 1):
            value, slope = nearest_boundary(forward, run.point, run.y, run.classes, self.ball.norm)
            run.point = self._step(run, value, slope)
            with torch.no_grad():
                wrong = succeeded(forward(run.point), run.y)
            self._note(run, run.point, wrong)
            kept = torch.where(wrong, self.beta, 1.0).to(run.point.dtype)
            run.point = torch.lerp(run.x, run.point, kept.view(-1, *[1] * (run.point.ndim - 1)))
            if done % LOOK_EVERY == 0 or done == self.steps:
                if done == self.steps:
                    self._refine(forward, run)
                    record.spend(run, _REFINEMENTS)
                record.spend(run, 2 * (done - looked))
                looked = done
                _keep_nearest(run, closest)
                if self.stop_when_fooled:
                    run = record.settle(run)
                if len(run.rows) == 0:
                    return

    def _step(self, run: _Boundary, value: Tensor, slope: Tensor) -> Tensor:
        """The next point, from the boundary {value + <slope, . - point> = 0}."""
        ball = self.ball
        slope = slope.flatten(1)
        both = torch.stack([run.point.flatten(1), run.x.flatten(1)])  # (2, B, D)
        at_centre = value + (slope * (both[1] - both[0])).sum(dim=1)
        gap = -torch.stack([value, at_centre])
        step = shortest_to_plane(ball.norm, both, slope, gap, ball.low, ball.high)
        size, size_0 = _norm(step, ball.norm)
        share = (size / positive(size + size_0)).clamp_max(self.alpha_max).unsqueeze(1)
        # (1 - a)(x + eta d) + a (x_0 + eta d_0) = lerp(x + eta d, x_0 + eta d_0, a)
        there, there_0 = both.add_(step, alpha=self.eta)
        return torch.lerp(there, there_0, share).clamp_(ball.low, ball.high).view_as(run.point)

    def _note(self, run: _Boundary, point: Tensor, wrong: Tensor) -> None:
        """Keep a misclassified point that is nearer than those before."""
        distance = _norm((point - run.x).flatten(1), self.ball.norm)
        nearer = wrong & (distance < run.distance)
        run.best = choose(nearer, point, run.best)
        run.distance = torch.where(nearer, distance, run.distance)
        if self.stop_when_fooled:
            run.catch(point, nearer & (distance <= self.ball.epsilon))

    @torch.no_grad()
    def _refine(self, forward: Forward, run: _Boundary) -> None:
        """False position for the margin between the image and the nearest point, where one was found."""
        shape = (-1, *[1] * (run.x.ndim - 1))
        inner, outer = torch.zeros_like(run.distance), torch.ones_like(run.distance)
        at_inner, at_outer = (margin(forward(p), run.y).to(inner.dtype) for p in (run.x, run.best))
        start = run.best
        for _ in range(_REFINEMENTS):
            share = inner + (outer - inner) * (at_inner / (at_inner - at_outer).clamp_max(-1e-12)).clamp(0, 1)
            point = torch.lerp(run.x, start, share.view(shape))
            logits = forward(point)
            wrong, value = succeeded(logits, run.y), margin(logits, run.y).to(inner.dtype)
            self._note(run, point, wrong & run.distance.isfinite())
            outer, at_outer = torch.where(wrong, share, outer), torch.where(wrong, value, at_outer)
            inner, at_inner = torch.where(wrong, inner, share), torch.where(wrong, at_inner, value)

    def _start(self, x: Tensor, distance: Tensor, generator: torch.Generator | None) -> Tensor:
        """Random point at half the distance found so far, or half of epsilon if that is less."""
        ball = self.ball
        noise = (normal if ball.norm != "linf" else uniform)(x.shape, x, generator).to(x.dtype).flatten(1)
        if ball.norm == "linf":
            noise = 2 * noise - 1
        radius = 0.5 * distance.clamp_max(ball.epsilon) / positive(_norm(noise, ball.norm))
        return (x + (noise * radius.unsqueeze(1)).view_as(x)).clamp_(ball.low, ball.high)


def nearest_boundary(forward: Forward, point: Tensor, y: Tensor, classes: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Value z_c - z_y (B,) and gradient (B, C, H, W) of the class c whose linearised boundary is nearest.

    Args:
        forward: model held still.
        point: images (B, C, H, W).
        y: labels int64 (B,).
        classes: candidates c, int64 (B, M); one backward pass for each of the M.
        norm: in which distances |z_c - z_y| / |gradient|_dual are compared.
    """
    point = point.detach().requires_grad_()
    logits = forward(point)
    label = labels_of(y).unsqueeze(1)
    values = logits.gather(1, classes) - logits.gather(1, label)
    require_values(values[:, 0], y)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for index in range(classes.shape[1]):
        keep = index + 1 < classes.shape[1]
        (slope,) = torch.autograd.grad(values[:, index].sum(), point, retain_graph=keep)
        slope = slope.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        value = values[:, index].detach()
        if not keep and best is None:
            return value, slope
        distance = value.abs() / positive(_norm(slope.flatten(1), _DUAL[norm]))
        if best is None:
            best = value, slope, distance
            continue
        nearer = distance < best[2]
        shape = (-1, *[1] * (slope.ndim - 1))
        best = (
            torch.where(nearer, value, best[0]),
            torch.where(nearer.view(shape), slope, best[1]),
            torch.where(nearer, distance, best[2]),
        )
    assert best is not None, "there is at least one class beside the label"
    return best[0], best[1]


_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def _norm(flat: Tensor, norm: str) -> Tensor:
    """Norm over the last dimension, (..., D) -> (...); built from what is fast on a CPU."""
    if norm == "linf":
        return flat.abs().amax(dim=-1)
    if norm == "l1":
        return flat.abs().sum(dim=-1)
    size: Tensor = torch.linalg.vector_norm(flat, dim=-1)
    return size


def _classes(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    """All classes but the label, likeliest first, int64 (B, K - 1)."""
    with torch.no_grad():
        classes = forward(x[:1]).shape[1]
    return wrong_classes(forward, x, y, max(classes - 1, 1))


def _one_by_one(classes: Tensor) -> Tensor:
    """Targets (B, T) as the aims of T runs side by side, (T B, 1), the first target of all examples first."""
    return classes.t().reshape(-1, 1)


def _boundary(rows: Tensor, x: Tensor, y: Tensor, classes: Tensor, point: Tensor, closest: Closest) -> _Boundary:
    """State of a run that starts at `point`, for `rows` of the whole batch."""
    return _Boundary(
        rows=rows,
        x=x[rows],
        y=y[rows],
        caught=point,
        fooled=torch.zeros_like(rows, dtype=torch.bool),
        classes=classes,
        point=point,
        best=closest.x_adv[rows],
        distance=closest.distance[rows],
    )


def _keep_nearest(run: _Boundary, closest: Closest) -> None:
    """Replace what is farther in `closest`; the first of several runs among equals."""
    nearest = closest.distance.scatter_reduce(0, run.rows, run.distance, "amin")
    winners = ((run.distance == nearest[run.rows]) & (run.distance < closest.distance[run.rows])).nonzero().flatten()
    winners = winners[first_of_each(run.rows[winners])]
    closest.x_adv[run.rows[winners]] = run.best[winners]
    closest.distance[run.rows[winners]] = run.distance[winners]
