"""Auto-PGD (APGD): gradient ascent whose step size follows its own progress, so that only the budget is chosen.

Sources: Croce and Hein, "Reliable evaluation of adversarial robustness ...", ICML 2020 (L-infinity, L2, DLR,
targets); Croce and Hein, "Mind the box", ICML 2021 (L1: sparse steps, decreasing radii).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    random_starts,
    wider,
)
from robustflat.attacks.apgd_turns import Turns
from robustflat.attacks.hunt import FILL, LOOK_EVERY, Confirm, Hunted, Record, begin, nothing_hunted
from robustflat.attacks.inputs import check_labels_on_cpu, check_shapes
from robustflat.attacks.judging import held_still, judge, require_values, succeeded
from robustflat.attacks.objectives import (
    dlr,
    labels_of,
    margin,
    objective_by_name,
    with_target,
)
from robustflat.errors import UserError, require_range
from robustflat.geometry.input_ball import InputBall
from robustflat.types import Forward, Found, Objective


class AutoPgd:
    """Projected gradient ascent with momentum 0.75 that halves its step where it stops making progress.

    Steps are checked after 22 % of all, then at intervals that shrink by 3 % down to 6 % of all. At a check an
    example's step is halved, and its search goes back to its best point, if no more than a share `rho` of the steps
    since the last check raised its objective, or if neither step nor best value changed since. The first step is
    2 epsilon long (L1: epsilon).

    In an L1 ball a step moves the pixels with the largest gradients by equal amounts. Their share starts at 1/5
    and follows the sparsity of the best point; the step shrinks by 1.5, down to a tenth, while that sparsity
    stays, and starts afresh when it has fallen.

    With `stop_when_fooled`, the runs after the first share their passes where few examples are left. Their results
    are those of one after another, random starts included: what follows a run with a success is repeated.

    Args:
        ball: the allowed images around each x.
        steps: gradient steps per run, >= 1.
        restarts: runs from different random starts, >= 1; with targets, for each of them.
        objective: what is maximised where the call gives no objective, by its name in `objectives`.
            "dlr_targeted" and "margin_to_target" search towards single classes, one run for each.
        targets: number of target classes for a targeted objective: the most probable wrong ones, at most K - 1.
        rho: share of raising steps up to which the step is halved, in (0, 1).
        eot: forward and backward passes that are averaged for every step, for models that draw random numbers
            (expectation over transformations). An example is then fooled if its mean probabilities are wrong.
        wide_start: search balls of 3 and 2 epsilon first, for 30 % of the steps each (recommended for L1).
        stop_when_fooled: an example leaves the search soon after it is misclassified (every 5 steps the search
            looks which are); its result is the last misclassified point. Several times faster where most examples
            are broken, and the same verdicts; but the objective there is not the largest possible. Otherwise the
            result is the point with the largest objective of all runs (for targeted ones a misclassified point
            first, then by margin).

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
            goal, aims = objective or self.searched, list(self._aims(forward, x, y, objective))
            shares = self.stop_when_fooled and self.eot == 1 and generator is not None
            most = 1  # the first run breaks most of what can be broken
            while aims:
                rows = record.open() if self.stop_when_fooled else torch.arange(len(x), device=x.device)
                if len(rows) == 0:
                    break
                turns = Turns(record, min(max(most // len(rows), 1), len(aims)))
                most = FILL if shares else 1
                search = _Search(forward, goal, reported, keep, record, generator, turns)
                aims = aims[self._run(search, x, aims, rows) :]
            return record.result(forward, reported)

    def _aims(self, forward: Forward, x: Tensor, y: Tensor, objective: Objective | None) -> Iterator[Tensor]:
        """Labels of one run after another."""
        aims = [y]
        if objective is None and self.aims:
            targets = wrong_classes(forward, x, y, self.targets).unbind(dim=1)
            aims = [with_target(y, target) for target in targets]
        for aim in aims:
            yield from [aim] * self.restarts

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

    def _run(self, search: _Search, images: Tensor, aims: Sequence[Tensor], rows: Tensor) -> int:
        """The next runs, side by side, for `rows` of the whole batch; the number of those that count."""
        turns, stages = search.turns, self._stages()
        x = images[rows].repeat(turns.count, *[1] * (images.ndim - 1))
        y = torch.cat([aim[rows] for aim in aims[: turns.count]])
        point, states = random_starts(stages[0][0].ball, x, turns.count, search.generator)
        for steps, count in stages:
            first, final = steps is stages[0][0], steps is stages[-1][0]
            point = point if first else steps.project(point, x)
            value, fooled, grad = search.evaluate(point, y, self.eot)
            assert grad is not None
            start = torch.cat([rows] * turns.count)
            run = depart(point, x=x, y=y, rows=start, value=value, grad=grad, first_step=steps.first_step)
            run.turn = torch.arange(turns.count, device=x.device).repeat_interleave(len(rows))
            search.record.spend(run, self.eot)
            if not first:
                follow_sparsity(run)
            if final:
                run.catch(point, fooled)
            run = self._ascend(search, run, steps, count, hunting=final and self.stop_when_fooled)
            point = run.best_point
        done = turns.close(run, lambda part: search.close(part, self.ball.project(part.best_point, part.x)))
        if done < turns.count and search.generator is not None:
            search.generator.set_state(states[done - 1])
        return done

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
                run = search.turns.settle(run)
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
    turns: Turns

    def evaluate(
        self, point: Tensor, y: Tensor, passes: int, *, grad: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value (B,), success (B,) and gradient at a point; means over `passes` passes of a random model."""
        point = point.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            answers = [self._pass(point, y, grad) for _ in range(passes)]
        values, probabilities, slopes = zip(*answers, strict=True)
        mean = probabilities[0] if passes == 1 else torch.stack(probabilities).softmax(dim=2).mean(dim=0)
        fooled = succeeded(mean, y)
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
        UserError: for a model of one class; on the CPU also for labels that are no class.
    """
    with torch.no_grad():
        logits = forward(x)
    check_labels_on_cpu(logits, y)
    if logits.shape[1] < 2:
        raise UserError(f"a search towards a class needs a model of at least 2 classes, got {logits.shape[1]}.")
    others = logits.scatter(1, labels_of(y)[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
