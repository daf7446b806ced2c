"""Fast minimum-norm attack: the nearest misclassified image instead of the worst one in a ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustflat.attacks.inputs import check_box_on_cpu, check_labels_on_cpu, check_shapes
from robustflat.attacks.judging import held_still, nothing_found, require_values, select, succeeded
from robustflat.attacks.objectives import margin, objective_by_name
from robustflat.errors import require_range
from robustflat.explanation import FORWARD, INPUT_BACKWARD, Explanation
from robustflat.geometry.input_ball import InputBall, L2Ball
from robustflat.types import Forward, Found, Objective

_UNIT_L2 = L2Ball(1.0)


class Fmn:
    """Searches the misclassified image nearest to x in the ball's norm (Pintor et al., NeurIPS 2021).

    A radius per example shrinks by the factor 1 - gamma while the image inside is misclassified and grows by
    1 + gamma while it is not; before the first success it is 1 + gamma times the distance at which the
    linearised margin vanishes (the paper's factor is 1, which only touches the boundary of a linear model).
    Each step climbs the margin along the gradient, scaled to L2 norm 1, and projects onto the current radius and
    the box. Step size and gamma fall along a cosine. `steps` steps cost steps + 1 forward and `steps` backward
    passes.

    The result is the nearest misclassified image if it lies in the ball, with size `ball.size(x_adv, x)`;
    otherwise the image of the search in the ball with the largest value. An image that is misclassified to begin
    with comes back unchanged. For distances without a limit take a ball as large as the box: `LinfBall(1.0)`.

    Args:
        ball: norm and limit.
        steps: number of steps, >= 1.
        step_size: first step in L2 units, > 0; rather too large than too small, the radius holds it back.
        final_step_size: last step, > 0.
        gamma: first relative change of the radius, in (0, 1).
        final_gamma: last one, in (0, 1).
        objective: name of the objective by which results are valued where the call gives none; the search itself
            always climbs the margin, whose zero is the decision boundary.

    Raises:
        UserError: if a number is out of range or the objective unknown.
    """

    def __init__(
        self,
        ball: InputBall,
        *,
        steps: int = 100,
        step_size: float = 1.0,
        final_step_size: float = 0.01,
        gamma: float = 0.05,
        final_gamma: float = 0.001,
        objective: str = "margin",
    ) -> None:
        require_range("steps", steps, low=1)
        require_range("step_size", step_size, low=0.0, low_open=True)
        require_range("final_step_size", final_step_size, low=0.0, low_open=True)
        require_range("gamma", gamma, low=0.0, high=1.0, low_open=True, high_open=True)
        require_range("final_gamma", final_gamma, low=0.0, high=1.0, low_open=True, high_open=True)
        self.ball = ball
        self.steps = steps
        self.step_sizes = (step_size, final_step_size)
        self.gammas = (gamma, final_gamma)
        self.objective = objective_by_name(objective)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Nearest misclassified images to x (B, C, H, W); see `types.Attack`. Draws nothing from `generator`."""
        check_shapes(x, y)
        if x.shape[0] == 0:
            return nothing_found(x)
        check_box_on_cpu(x, self.ball.low, self.ball.high)
        with torch.inference_mode(False), torch.enable_grad(), held_still(forward):
            x, y = (t.clone() if t.is_inference() else t.detach() for t in (x, y))
            return self._search(forward, x, y, objective or self.objective)

    def rehearse(self, x: Tensor, generator: torch.Generator) -> bool:
        """Nothing is drawn; see `attacks.rehearsal`."""
        return True

    def explain(self) -> Explanation:
        """A search for the decision boundary, and a pass that judges the last point."""
        cost = (FORWARD + INPUT_BACKWARD).times(self.steps, "K", K=self.steps) + FORWARD
        formula = f"x' = nearest misclassified image, by K = {self.steps} steps along the decision boundary"
        return Explanation(formula, "Pintor et al., NeurIPS 2021", cost)

    def _search(self, forward: Forward, x: Tensor, y: Tensor, objective: Objective) -> Found:
        point = x
        radius = torch.full_like(x[:, 0, 0, 0], torch.inf)
        memory = _Memory(self.ball, x)
        for step in range(self.steps):
            gamma, length = (_cosine(*ends, step, self.steps) for ends in (self.gammas, self.step_sizes))
            point = point.detach().requires_grad_()
            logits = forward(point)
            check_labels_on_cpu(logits, y)
            height = margin(logits, y)
            require_values(height, y)
            (grad,) = torch.autograd.grad(height.sum(), point)
            point = point.detach()
            with torch.no_grad():
                found_before = memory.has_adversarial()
                fooled = succeeded(logits, y)
                size = memory.see(Found(point, objective(logits, y), fooled))
                linear = size - height.detach().to(size.dtype) / _dual_norm(grad, self.ball.norm)
                outside = torch.where(found_before, radius, linear) * (1 + gamma)
                inside = torch.minimum(radius * (1 - gamma), memory.smallest)
                radius = torch.where(fooled, inside, outside)
                moved = point + length * _UNIT_L2.steepest(grad) - x
                point = (x + within(moved, radius, self.ball.norm)).clamp(self.ball.low, self.ball.high)
        with torch.no_grad():
            logits = forward(point)
            memory.see(Found(point, objective(logits, y), succeeded(logits, y)))
        return memory.result()


class _Memory:
    """Per example the nearest misclassified image in the ball, and the image in the ball of largest value."""

    def __init__(self, ball: InputBall, x: Tensor) -> None:
        self.ball = ball
        self.x = x
        self.smallest = torch.full_like(x[:, 0, 0, 0], torch.inf)  # also of those outside of the ball
        self.nearest: Found | None = None
        self.highest: Found | None = None

    def has_adversarial(self) -> Tensor:
        return self.smallest.isfinite()

    def see(self, new: Found) -> Tensor:
        """Take note of an image of the search; returns its size, (B,)."""
        size = self.ball.size(new.x_adv, self.x).to(self.smallest.dtype)
        nearer = new.fooled & (size < self.smallest)
        self.smallest = torch.where(nearer, size, self.smallest)
        if self.nearest is None or self.highest is None:
            self.nearest = self.highest = new
            return size
        inside = size <= self.ball.epsilon
        self.nearest = select(nearer & inside, new, self.nearest)
        self.highest = select(inside & (new.value > self.highest.value), new, self.highest)
        return size

    def result(self) -> Found:
        assert self.nearest is not None
        assert self.highest is not None
        return select(self.nearest.fooled, self.nearest, self.highest)


def within(delta: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Nearest perturbation of norm at most `radius`, one radius per example.

    Args:
        delta: perturbations (B, C, H, W).
        radius: (B,), >= 0, may be infinite; a negative one counts as zero.
        norm: "linf", "l2" or "l1".
    """
    limit = radius.clamp_min(0).view(-1, 1, 1, 1)
    if norm == "linf":
        return torch.maximum(torch.minimum(delta, limit), -limit)
    length = delta.flatten(1).norm(p=2 if norm == "l2" else 1, dim=1).view_as(limit)
    if norm == "l2":
        factor = limit / length.clamp_min(torch.finfo(delta.dtype).tiny)
        return torch.where(length > limit, factor * delta, delta)
    return torch.where(length > limit, _within_l1(delta, limit), delta)


def _within_l1(delta: Tensor, limit: Tensor) -> Tensor:
    """Soft thresholding with the threshold that makes the L1 norm equal to `limit` (B, 1, 1, 1)."""
    ordered = delta.abs().flatten(1).sort(dim=1, descending=True).values
    count = torch.arange(1, ordered.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    threshold = (ordered.cumsum(dim=1) - limit.flatten(1)) / count
    used = (ordered > threshold).sum(dim=1, keepdim=True).clamp_min(1)
    return delta.sign() * (delta.abs() - threshold.gather(1, used - 1).view_as(limit)).clamp_min(0)


def _dual_norm(grad: Tensor, norm: str) -> Tensor:
    """Norm (B,) that bounds the change of a linear function per unit of `norm`."""
    flat = grad.flatten(1)
    dual = {"linf": 1.0, "l2": 2.0, "l1": math.inf}[norm]
    size: Tensor = torch.linalg.vector_norm(flat, ord=dual, dim=1)
    return size.clamp_min(torch.finfo(grad.dtype).tiny)


def _cosine(first: float, last: float, step: int, steps: int) -> float:
    """Falls from `first` at step 0 to `last` at the last step along half a cosine."""
    share = step / max(steps - 1, 1)
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
