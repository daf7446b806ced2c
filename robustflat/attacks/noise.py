"""Attacks that rest on random noise: pure noise as a baseline, and N-FGSM for training."""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.attacks.inputs import check_box_on_cpu, check_labels_on_cpu, check_shapes
from robustflat.attacks.judging import (
    held_still,
    improves,
    judge,
    judge_as_is,
    nothing_found,
    require_values,
    select,
)
from robustflat.attacks.objectives import objective_by_name
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.explanation import FORWARD, INPUT_BACKWARD, Explanation
from robustflat.geometry.input_ball import InputBall
from robustflat.geometry.numerics import normal, uniform
from robustflat.types import Forward, Found, Objective


class RandomNoise:
    """The worst of several random images in the ball: what an attack without gradients and queries reaches.

    The clean image is not among them.

    Args:
        ball: the allowed images around each x.
        trials: number of random images, >= 1; one forward pass each.
        kind: "uniform": uniform in the ball; "gaussian": Gaussian noise scaled to size epsilon, then into the box.
        objective: name of the objective where the call gives none.

    Raises:
        UserError: if an argument is not allowed.
    """

    def __init__(
        self, ball: InputBall, *, trials: int = 1, kind: str = "uniform", objective: str = "cross_entropy"
    ) -> None:
        require_range("trials", trials, low=1)
        require_one_of("kind", kind, ("uniform", "gaussian"))
        self.ball = ball
        self.trials = trials
        self.kind = kind
        self.objective = objective_by_name(objective)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Best of `trials` draws around images x (B, C, H, W); see `types.Attack`."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        check_box_on_cpu(x, self.ball.low, self.ball.high)
        with held_still(forward):
            best: Found | None = None
            for _ in range(self.trials):
                new = judge_as_is(forward, self._draw(x, generator), y, objective or self.objective)
                best = new if best is None else select(improves(new, best, "best"), new, best)
        assert best is not None
        return best

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw all images; see `attacks.rehearsal`."""
        for _ in range(self.trials):
            self._draw(x, generator)
        return True

    def explain(self) -> Explanation:
        """The worst of the draws, each judged by one forward pass."""
        cost = FORWARD.times(self.trials, "T", T=self.trials)
        return Explanation(f"x' = worst of T = {self.trials} draws of {self.kind} noise in the ball", cost=cost)

    @torch.no_grad()
    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.kind == "uniform":
            return self.ball.sample(x, generator)
        noise = normal(x.shape, x, generator).to(x.dtype)
        size = self.ball.size(noise, torch.zeros_like(x)).view(-1, 1, 1, 1).to(x.dtype)
        return self.ball.project(x + self.ball.epsilon / size * noise, x)


class NFgsm:
    """N-FGSM (de Jorge et al., NeurIPS 2022): a sign step from strong noise, *not* clipped to the ball.

    With n uniform in [-k epsilon, k epsilon] per pixel, x' = x + n + step_size * sign(gradient at x + n); x + n
    and x' are clipped to the box only. The result may lie up to k * epsilon + step_size from x: it is meant for
    training, where leaving the noise unclipped is what prevents catastrophic overfitting, not for evaluation.

    Args:
        ball: an L-infinity ball, for epsilon and the box.
        step_size: length of the step, > 0, in [0, 1] units; the paper takes epsilon.
        noise_factor: k, > 0; the paper takes 2.
        objective: name of the objective where the call gives none.

    Raises:
        UserError: if the ball is not L-infinity or a number is out of range.
    """

    def __init__(
        self, ball: InputBall, *, step_size: float, noise_factor: float = 2.0, objective: str = "cross_entropy"
    ) -> None:
        if ball.norm != "linf":
            raise UserError(f"NFgsm needs an L-infinity ball, got one of norm {ball.norm}. Use LinfBall.")
        require_range("step_size", step_size, low=0.0, low_open=True)
        require_range("noise_factor", noise_factor, low=0.0, low_open=True)
        self.ball = ball
        self.step_size = step_size
        self.noise_factor = noise_factor
        self.objective = objective_by_name(objective)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Noise and one step on images x (B, C, H, W); see `types.Attack` for the arguments."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        check_box_on_cpu(x, self.ball.low, self.ball.high)
        objective = objective or self.objective
        with torch.inference_mode(False), torch.enable_grad(), held_still(forward):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            noisy = self._noisy(x, generator).requires_grad_()
            logits = forward(noisy)
            check_labels_on_cpu(logits, y)
            value = objective(logits, y)
            require_values(value, y)
            (grad,) = torch.autograd.grad(value.sum(), noisy)
            moved = (noisy.detach() + self.step_size * grad.sign()).clamp(self.ball.low, self.ball.high)
        return judge(forward, moved, y, objective)

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Draw the noise; see `attacks.rehearsal`."""
        self._noisy(x, generator)
        return True

    def explain(self) -> Explanation:
        """One step from the noise, and a pass that judges the result."""
        noise = f"n uniform in [-k eps, k eps], k = {self.noise_factor:g}"
        formula = (
            f"x' = x + n + {self.step_size:g} sign grad_x objective(f(x + n), y), {noise}, not clipped to the ball"
        )
        return Explanation(formula, "de Jorge et al., NeurIPS 2022", FORWARD + INPUT_BACKWARD + FORWARD)

    def _noisy(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        unit = uniform(x.shape, x, generator).to(x.dtype)
        noise = self.noise_factor * self.ball.epsilon * (2 * unit - 1)
        return (x + noise).clamp(self.ball.low, self.ball.high)
