"""Auto-PGD (APGD): gradient ascent whose step size follows its own progress, so that only the budget is chosen.

Sources: Croce and Hein, "Reliable evaluation of adversarial robustness ...", ICML 2020 (L-infinity, L2, DLR,
targets); Croce and Hein, "Mind the box", ICML 2021 (L1: sparse steps, decreasing radii).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustflat.attacks.apgd_steps import (
    Ascent,
    DenseSteps,
    SparseSteps,
    Steps,
    depart,
    follow_sparsity,
    random_start,
    wider,
)
from robustflat.attacks.hunt import LOOK_EVERY, Confirm, Hunted, Record, begin, nothing_hunted
from robustflat.attacks.inputs import check_shapes
from robustflat.attacks.judging import held_still, judge, require_values
from robustflat.attacks.objectives import (
    dlr,
    labels_of,
    margin,
    objective_by_name,
    predicted_wrong,
    with_target,
)
from robustflat.errors import UserError, require_range
from robustflat.geometry.input_ball import InputBall
from robustflat.types import Forward, Found, Objective


class AutoPgd:
    """Projected gradient ascent with momentum 0.75 that halves its step where it stops making progress.

    Steps are checked after 22 % of all, then at intervals that shrink by 3 % down to 6 % of all. At a check an
    example's step is halved, and its search goes back to its best point, if fewer than a share `rho` of the steps
    since the last check raised its objective, or if neither step nor best value changed since. The first step is
    2 epsilon long (L1: epsilon).

    In an L1 ball a step moves the pixels with the largest gradients by equal amounts. Their share starts at 1/5
    and follows the sparsity of the best point; the step shrinks by 1.5, down to a tenth, while that sparsity
    stays, and starts afresh when it has fallen.

    Args:
        ball: the allowed images around each x.
        steps: gradient steps per run, >= 1.
        restarts: runs from different random starts, >= 1; with targets, for each of them.
        objective: what is maximised where the call gives no objective, by its name in `objectives`.
            "dlr_targeted" and "margin_to_target" search towards single classes, one run for each.
        targets: number of target classes for a targeted objective: the most probable wrong ones, at most K - 1.
        rho: share of raising steps below which the step is halved, in (0, 1).
        eot: forward and backward passes that are averaged for every step, for models that draw random numbers
            (expectation over transformations). An example is then fooled if its mean probabilities are wrong.
        wide_start: search balls of 3 and 2 epsilon first, for 30 % of the steps each (recommended for L1).
        stop_when_fooled: an example leaves the search at its first misclassified point, which is its result.
            Several times faster where most examples are broken, and the same verdicts; but the objective there is
            not the largest possible. Otherwise the result is the point with the largest objective of all runs
            (for targeted ones a misclassified point first, then by margin).

    Raises:
        UserError: if a number is out of range or a name unknown.
    """

    def __init__(
        self,
        ball: InputBall,
        *,
        steps: int = 100,
        restarts: int = 1,
        objective: str = "cross_entropy",
        targets: int = 9,
        rho: float = 0.75,
        eot: int = 1,
        wide_start: bool = False,
        stop_when_fooled: bool = False,
    ) -> None:
        require_range("steps", steps, low=1)
        require_range("restarts", restarts, low=1)
        require_range("targets", targets, low=1)
        require_range("rho", rho, low=0.0, high=1.0, low_open=True, high_open=True)
        require_range("eot", eot, low=1, hint="1 is for models that draw no random numbers.")
        self.ball = ball
        self.steps = steps
        self.restarts = restarts
        self.searched = objective_by_name(objective)
        self.aims = objective in ("dlr_targeted", "margin_to_target")
        # Values towards different targets cannot be compared; the untargeted form can.
        untargeted = dlr if objective == "dlr_targeted" else margin
        self.objective: Objective = untargeted if self.aims else self.searched
        self.targets = targets
        self.rho = rho
        self.eot = eot
        self.wide_start = wide_start
        self.stop_when_fooled = stop_when_fooled

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Search around images x (B, C, H, W) in [0, 1].

        Args:
            forward: the model, or any differentiable callable images -> logits (taken as it is).
            x: images; not modified.
            y: labels int64 (B,), or probabilities (B, K) for an objective that takes them.
            objective: overrides the attack's own; the search is then untargeted.
            generator: source of the random starts; `None` is torch's global one.

        Returns:
            Found with x_adv like x, value (B,) of the objective there, and fooled (B,).

        Raises:
            UserError: if x or y have the wrong shape or type, or the value cannot be differentiated.
        """
        return self.hunt(forward, x, y, objective, generator).found

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw the starts of all runs; not known with targets or early stops. See `attacks.rehearsal`."""
        if self.stop_when_fooled or self.aims:
            return False
        for _ in range(self.restarts):
            random_start(self._stages()[0][0].ball, x, generator)
        return True

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
        """Like a call, and says how many forward passes each example took.

        Args:
            forward, x, y, objective, generator: as in a call.
            confirm: judges what `stop_when_fooled` would stop at, where `forward` is only an approximation.
        """
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_hunted(x)
        with torch.inference_mode(False), torch.enable_grad(), held_still(forward):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            reported = objective or self.objective
            record = begin(forward, x, y, self.ball, reported, confirm)
            keep = "fooled" if self.stop_when_fooled or (self.aims and objective is None) else "best"
            for goal, aim in self._plans(forward, x, y, objective):
                rows = record.open() if self.stop_when_fooled else torch.arange(len(x), device=x.device)
                if len(rows) == 0:
                    break
                self._run(_Search(forward, goal, reported, keep, record, generator), x[rows], aim[rows], rows)
            return record.result(forward, reported)

    def _plans(
        self, forward: Forward, x: Tensor, y: Tensor, objective: Objective | None
    ) -> Iterator[tuple[Objective, Tensor]]:
        """Objective and labels of one run after another."""
        if objective is not None or not self.aims:
            for _ in range(self.restarts):
                yield objective or self.searched, y
            return
        for target in wrong_classes(forward, x, y, self.targets).unbind(dim=1):
            for _ in range(self.restarts):
                yield self.searched, with_target(y, target)

    def _stages(self) -> list[tuple[Steps, int]]:
        """Geometry and length of each part of a run; the last one is in the ball asked for."""
        radii = [(3.0, 0.3), (2.0, 0.3), (1.0, 0.4)] if self.wide_start else [(1.0, 1.0)]
        stages: list[tuple[Steps, int]] = []
        for factor, share in radii:
            ball = self.ball if factor == 1 else wider(self.ball, factor)
            steps = max(int(share * self.steps), 1)
            if ball.norm == "l1":
                stages.append((SparseSteps(ball, every=max(int(0.04 * self.steps), 1)), steps))
            else:
                stages.append((DenseSteps(ball, steps=steps, rho=self.rho), steps))
        return stages

    def _run(self, search: _Search, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """One run for the examples x, y, which are `rows` of the whole batch."""
        point: Tensor | None = None
        stages = self._stages()
        for steps, count in stages:
            fresh = point is None
            point = random_start(steps.ball, x, search.generator) if point is None else steps.project(point, x)
            final = steps is stages[-1][0]
            value, fooled, grad = search.evaluate(point, y, self.eot)
            assert grad is not None
            run = depart(point, x=x, y=y, rows=rows, value=value, grad=grad, first_step=steps.first_step)
            search.record.spend(run, self.eot)
            if not fresh:
                follow_sparsity(run)
            if final:
                run.catch(point, fooled)
            run = self._ascend(search, run, steps, count, hunting=final and self.stop_when_fooled)
            point = run.best_point
        if len(run.rows):
            search.close(run, self.ball.project(run.best_point, run.x))

    def _ascend(self, search: _Search, run: Ascent, steps: Steps, count: int, *, hunting: bool) -> Ascent:
        """`count` steps; if `hunting`, the examples fooled on the way are dropped."""
        looked = 0
        for done in range(1, count + 1):
            point = steps.onward(run)
            value, fooled, grad = search.evaluate(point, run.y, self.eot, grad=done < count)
            run.arrive(point, value, grad)
            steps.adapt(run, done)
            if not hunting:
                continue
            run.catch(point, fooled)
            if done % LOOK_EVERY == 0 or done == count:
                search.record.spend(run, (done - looked) * self.eot)
                looked = done
                run = search.record.settle(run)
                if len(run.rows) == 0:
                    break
        if not hunting:
            search.record.spend(run, count * self.eot)
        return run


@dataclass
class _Search:
    """What a run works with, beside its examples."""

    forward: Forward
    goal: Objective
    reported: Objective
    keep: str
    record: Record
    generator: torch.Generator | None

    def evaluate(
        self, point: Tensor, y: Tensor, passes: int, *, grad: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value (B,), success (B,) and gradient at a point; means over `passes` passes of a random model."""
        point = point.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            answers = [self._pass(point, y, grad) for _ in range(passes)]
        values, probabilities, slopes = zip(*answers, strict=True)
        mean = probabilities[0] if passes == 1 else torch.stack(probabilities).softmax(dim=2).mean(dim=0)
        fooled = predicted_wrong(mean, y) & mean.isfinite().all(dim=1)
        value = torch.stack(values).mean(dim=0).nan_to_num(nan=-torch.inf)
        slope = sum(slopes[1:], slopes[0]) if grad else None
        return value, fooled, slope

    def _pass(self, point: Tensor, y: Tensor, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Value, logits and gradient (nothing but zero where it is not finite) of one pass."""
        logits = self.forward(point)
        value = self.goal(logits, y)
        if not grad:
            return value, logits, point
        require_values(value, y)
        (slope,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), logits.detach(), slope.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def close(self, run: Ascent, point: Tensor) -> None:
        """Offer the best point of every example left in the run."""
        new = judge(self.forward, point, run.y, self.reported)
        new = new._replace(value=new.value.nan_to_num(nan=-torch.inf))
        if self.record.confirm is not None:
            new = new._replace(fooled=new.fooled & self.record.confirm(point, run.y))
        self.record.offer(run.rows, new, self.keep)


def wrong_classes(forward: Forward, x: Tensor, y: Tensor, count: int) -> Tensor:
    """The `count` most probable classes but for the label, at most K - 1, int64 (B, count); likeliest first.

    Raises:
        UserError: for a model of one class.
    """
    with torch.no_grad():
        logits = forward(x)
    if logits.shape[1] < 2:
        raise UserError(f"a target needs a class beside the label, but the model has {logits.shape[1]} class.")
    others = logits.scatter(1, labels_of(y)[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
