"""Projected gradient ascent on an objective of the logits, and the attack that does nothing.

Sources: Madry et al., ICLR 2018; momentum after Dong et al., CVPR 2018, in the damped form released by Stutz et
al., ICCV 2021; early stopping (tau) as released there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.attacks.captured import passed
from robustflat.attacks.inputs import check_box_on_cpu, check_shapes
from robustflat.attacks.iterates import EarlyStopper, Keeper, Walk
from robustflat.attacks.judging import (
    KEEP,
    held_still,
    improves,
    judge,
    judge_as_is,
    maximised,
    nothing_found,
    select,
    succeeded,
)
from robustflat.attacks.objectives import objective_by_name
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.explanation import FORWARD, INPUT_BACKWARD, Explanation
from robustflat.geometry.input_ball import InputBall
from robustflat.geometry.numerics import normal
from robustflat.models.chunks import pieces
from robustflat.types import Forward, Found, Objective

GAUSSIAN_START = 0.001
"""Standard deviation of the Gaussian start, in [0, 1] units (TRADES, Zhang et al., ICML 2019)."""

L1_SPARSITY = 0.05
"""Share of the coordinates that a step in an L1 ball moves by default; 0.05 to 0.1 found the most on 8x8 digits."""

_STARTS = ("uniform", "uniform_norm", "gaussian")


class NoAttack:
    """Returns the images themselves, judged by one forward pass.

    Args:
        objective: name of the objective that is evaluated where the call gives none.

    Raises:
        UserError: if the objective is unknown.
    """

    def __init__(self, objective: str = "cross_entropy") -> None:
        self.objective = objective_by_name(objective)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Objective and correctness at x (B, C, H, W) itself; `x_adv` is `x`."""
        check_shapes(x, y)
        return judge(forward, x, y, objective or self.objective)

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Nothing is drawn; see `attacks.rehearsal`."""
        return True

    def explain(self) -> Explanation:
        """The images stay; one forward pass judges them, which training leaves out."""
        return Explanation("x' = x", cost=FORWARD)


class Pgd:
    """Projected gradient ascent inside a ball around each image; keeps one iterate per example.

    One step is g <- momentum * g + (1 - momentum) * s, x' <- project(x' + step_size * g), with s the direction
    of norm 1 in which the objective rises fastest (the sign of the gradient for L-infinity). `steps` steps cost
    steps + 1 forward passes and `steps` backward passes to the input, and never wait for the device. A forward
    that is a module runs in eval mode with frozen weights and is left as it was found.

    FGSM is `steps=1, step_size=epsilon, random_start=False, keep="last"`; fast adversarial training (Wong et
    al., ICLR 2020) is `steps=1, step_size=1.25 * epsilon, keep="last"`.

    >>> from robustflat.geometry.input_ball import LinfBall
    >>> attack = Pgd(LinfBall(8 / 255), steps=7, step_size=0.007)

    Args:
        ball: the allowed images around each x.
        steps: number of gradient steps, >= 1.
        step_size: length of one step in the ball's norm, > 0, in [0, 1] units for L-infinity.
        momentum: share of the old direction, in [0, 1).
        random_start: where the search begins: `True` or "uniform": uniform in the ball; "uniform_norm": uniform
            distance in a random direction, as released by Stutz et al. (closer to x than "uniform");
            "gaussian": x plus noise of standard deviation 0.001, as TRADES has it; `False`: x.
        objective: what is maximised where the call gives no objective; a name of `objectives.OBJECTIVES`.
        targeted: y holds the classes to reach. The objective is then minimised, `value` is its negative and
            `fooled` says that the target is predicted.
        restarts: independent starts, run as one batch of restarts * B images (for less memory wrap the attack
            in `Restarts`); needs a random start.
        keep: the iterate returned, the start and the last point included. "best": largest value; "fooled": a
            fooled one if there is one, the largest value among equals; "last": the last. Restarts are compared
            by "best", or by "fooled" if that is what keeps iterates, or with tau.
        backtracking: a step that lowers an example's objective is taken back, and that example's steps become
            shorter by this factor in (0, 1); `True` is 0.5. Same number of passes.
        tau: early-stopped PGD: an iterate is stored only if it is misclassified and better than those stored
            before, at most tau + 1 times. An example that is never misclassified stays clean (the tau of Stutz
            et al.; Friendly AT, Zhang et al., ICML 2020, returns its last iterate instead). Costs one forward
            pass more, for the value of the clean images.
        l1_sparsity: for an L1 ball, in (0, 1]: a step moves this share of the coordinates, those with the largest
            gradients that the box does not block, in proportion to the gradient. Steps of epsilon / 2 to epsilon
            suit it. `None` is 0.05. (Moving the one steepest coordinate gets stuck at the end of the box: on a
            network for 8x8 digits, epsilon 2.5, it reached a cross-entropy of 2.0, this 8.1.)

    Raises:
        UserError: if a number is out of range, a name unknown, or two options contradict each other.
    """

    def __init__(
        self,
        ball: InputBall,
        *,
        steps: int,
        step_size: float,
        momentum: float = 0.0,
        random_start: bool | str = True,
        objective: str = "cross_entropy",
        targeted: bool = False,
        restarts: int = 1,
        keep: str = "best",
        backtracking: bool | float = False,
        tau: int | None = None,
        l1_sparsity: float | None = None,
    ) -> None:
        require_range("steps", steps, low=1, hint="For no attack use attack=none.")
        require_range("step_size", step_size, low=0.0, low_open=True)
        require_range("momentum", momentum, low=0.0, high=1.0, high_open=True)
        require_range("restarts", restarts, low=1)
        require_one_of("keep", keep, KEEP)
        self.ball = ball
        self.steps = steps
        self.step_size = step_size
        self.momentum = momentum
        self.random_start = _start_name(random_start)
        self.objective = objective_by_name(objective)
        self.targeted = targeted
        self.restarts = restarts
        self.keep = keep
        self.shrink = _shrink_factor(backtracking)
        self.tau = tau
        self._check_combinations(l1_sparsity)
        self.l1_sparsity = L1_SPARSITY if ball.norm == "l1" and l1_sparsity is None else l1_sparsity

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
            y: labels or probabilities, see `objectives`; target classes if `targeted`.
            objective: overrides the attack's own.
            generator: source of the random start; `None` is torch's global one.

        Returns:
            Found with x_adv like x, value (B,) of the objective there, and fooled (B,).

        Raises:
            UserError: if x or y have the wrong shape or type, or the value cannot be differentiated; on the CPU
                also for images outside the box and labels that are no class (elsewhere looking would mean
                waiting: the front doors look).
        """
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        check_box_on_cpu(x, self.ball.low, self.ball.high)
        objective = objective or self.objective
        # Tensors made in a caller's inference mode cannot be differentiated; copies made outside of it can.
        with torch.inference_mode(False), torch.enable_grad(), held_still(forward):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            if self.restarts == 1:
                return self._search(forward, x, y, objective, generator)
            many_x, many_y = (copies(t, self.restarts) for t in (x, y))
            return self._best_restart(self._search(forward, many_x, many_y, objective, generator))

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw the random start of all restarts; see `attacks.rehearsal`."""
        self._start(copies(x, self.restarts), generator)
        return True

    def explain(self) -> Explanation:
        """Projected gradient ascent with these steps; with tau the clean images are judged as well."""
        once = (FORWARD + INPUT_BACKWARD).times(self.steps, "K", K=self.steps) + FORWARD
        if self.tau is not None:
            once = FORWARD + once
        cost = once if self.restarts == 1 else once.times(self.restarts, "R", R=self.restarts)
        sources = ["Madry et al., ICLR 2018" if self.steps > 1 else "Goodfellow et al., ICLR 2015"]
        if self.momentum > 0:
            sources.append("momentum: Dong et al., CVPR 2018")
        if self.tau is not None:
            sources.append("early stopping: Zhang et al., ICML 2020, as in Stutz et al., ICCV 2021")
        sign = "-" if self.targeted else "+"
        direction = "sign grad" if self.ball.norm == "linf" else "steepest(grad)"
        kept = f"stopped {self.tau} stored iterates after the first mistake" if self.tau is not None else self.keep
        step = f"x' <- project(x' {sign} {self.step_size:g} {direction}_x' objective(f(x'), y))"
        return Explanation(f"K = {self.steps} times {step}; kept: {kept}", "; ".join(sources), cost)

    def _search(
        self, forward: Forward, x: Tensor, y: Tensor, objective: Objective, generator: torch.Generator | None
    ) -> Found:
        """One search per image of x."""
        point = self._start(x, generator)
        walk = Walk(
            self.ball,
            x,
            step_size=self.step_size,
            momentum=self.momentum,
            shrink=self.shrink,
            l1_sparsity=self.l1_sparsity,
        )
        keeper: Keeper | EarlyStopper = Keeper(self.keep)
        if self.tau is not None:
            keeper = EarlyStopper(judge_as_is(forward, x, y, objective, targeted=self.targeted), self.tau)
        goal = maximised(objective, self.targeted)
        for _ in range(self.steps):
            new, grad = self._evaluate(forward, point, y, goal)
            keeper.see(new)
            point = walk.onward(new, grad)
            del grad  # no use for it while the next one is found
        keeper.see(judge_as_is(forward, point, y, objective, targeted=self.targeted))
        return keeper.kept()

    def _start(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.random_start is None:
            return x
        if self.random_start == "uniform":
            return self.ball.sample(x, generator)
        if self.random_start == "uniform_norm":
            return self.ball.sample_uniform_norm(x, generator)
        return self.ball.project(x + GAUSSIAN_START * normal(x.shape, x, generator).to(x.dtype), x)

    def _evaluate(self, forward: Forward, point: Tensor, y: Tensor, goal: Objective) -> tuple[Found, Tensor]:
        """Value and success at `point`, and the gradient of the value, piece by piece where memory is bounded."""
        parts = [self._pass(network, at, labels, goal) for network, (at, labels) in pieces(forward, point, y)]
        if len(parts) == 1:
            return parts[0]
        values, fooled = (torch.cat([found[i] for found, _ in parts]) for i in (1, 2))
        return Found(point.detach(), values, fooled), torch.cat([grad for _, grad in parts])

    def _pass(self, forward: Forward, point: Tensor, y: Tensor, goal: Objective) -> tuple[Found, Tensor]:
        logits, value, grad = passed(forward, point, y, goal)
        return Found(point.detach(), value, succeeded(logits, y, self.targeted)), grad

    def _best_restart(self, copies: Found) -> Found:
        rule = "fooled" if self.keep == "fooled" or self.tau is not None else "best"
        runs = [Found(*run) for run in zip(*(part.chunk(self.restarts) for part in copies), strict=True)]
        best = runs[0]
        for run in runs[1:]:
            best = select(improves(run, best, rule), run, best)
        return best

    def _check_combinations(self, l1_sparsity: float | None) -> None:
        if self.restarts > 1 and self.random_start is None:
            raise UserError("restarts > 1 would repeat the same search: give a random_start, or restarts=1.")
        if self.tau is not None:
            require_range("tau", self.tau, low=0, hint="tau=null is plain PGD.")
        if self.keep != "best" and (self.tau is not None or self.shrink is not None):
            raise UserError(f"keep={self.keep} does not go with tau or backtracking, which decide it themselves.")
        if l1_sparsity is not None:
            require_range("l1_sparsity", l1_sparsity, low=0.0, high=1.0, low_open=True)
            if self.ball.norm != "l1":
                raise UserError(f"l1_sparsity is for an L1 ball; this ball's norm is {self.ball.norm}. Remove it.")


def copies(t: Tensor, times: int) -> Tensor:
    """`times` copies of a tensor (B, ...), one after the other: (times * B, ...); the tensor itself for one.

    Unlike those of `repeat`, they keep channels-last strides.
    """
    return t if times == 1 else torch.cat([t] * times)


def _start_name(random_start: bool | str) -> str | None:
    if isinstance(random_start, bool):
        return "uniform" if random_start else None
    require_one_of("random_start", random_start, _STARTS, hint="True is 'uniform'; False starts at the image.")
    return random_start


def _shrink_factor(backtracking: bool | float) -> float | None:
    if isinstance(backtracking, bool):
        return 0.5 if backtracking else None
    require_range("backtracking", backtracking, low=0.0, high=1.0, low_open=True, high_open=True)
    return backtracking
