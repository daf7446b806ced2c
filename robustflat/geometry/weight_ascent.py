"""Projected steepest ascent in a ball of weight perturbations, for loops: the weights it is relative to stay."""

from __future__ import annotations

import torch
from torch import Tensor

from robustflat.geometry.numerics import positive
from robustflat.geometry.weight_ball import WeightBall, shrinking, tensor_norms
from robustflat.types import Weights


class WeightAscent:
    """Steps nu <- project(nu + steepest(grad)) in a ball around fixed weights, bit for bit those of `WeightBall`.

    Limits are computed once, and the factors of all tensors of a network in one operation, where groups are whole
    tensors: for a small network that is a third of the time of a step.

    Args:
        ball: the allowed perturbations.
        step: length of a step in the ball's own units (a fraction of each group's norm if relative), > 0.
        w: the unperturbed weights, not to be changed in place meanwhile.
    """

    def __init__(self, ball: WeightBall, step: float, w: Weights) -> None:
        self._ball, self._w = ball, w
        self._stride = WeightBall(step, ball.norm, ball.grouping, ball.relative)
        tensors = list(w.values())
        # Sums over groups of other shapes, and tensors on several devices or in several types, go one by one.
        alike = len({(t.device, t.dtype) for t in tensors}) == 1
        self._limits: tuple[Tensor, Tensor] | None = None
        if ball.norm == 2 and ball.grouping == "layer" and alike:
            by_name = ball.limits(w), self._stride.limits(w)
            self._limits = (torch.stack([*by_name[0].values()]), torch.stack([*by_name[1].values()]))

    @torch.no_grad()
    def onward(self, nu: Weights, grad: Weights) -> Weights:
        """The perturbation after one step from nu.

        Args:
            nu: names and shapes of the weights.
            grad: gradient of what is to rise, with these names.

        Raises:
            UserError: if names differ.
        """
        if self._limits is None or not nu.keys() == grad.keys() == self._w.keys():
            steps = self._stride.steepest(grad, self._w)
            return self._ball.project({name: nu[name] + steps[name] for name in nu}, self._w)
        limits, strides = self._limits
        nu, grad = ({name: v[name] for name in self._w} for v in (nu, grad))  # in the order of the limits
        factors = strides / positive(_norms(grad))
        moved = {n: nu[n] + (grad[n] * f).to(grad[n].dtype) for n, f in zip(nu, factors.unbind(), strict=True)}
        factors = shrinking(_norms(moved), limits)
        return {n: (step * f).to(step.dtype) for (n, step), f in zip(moved.items(), factors.unbind(), strict=True)}


def _norms(v: Weights) -> Tensor:
    return torch.stack([*tensor_norms(v, 2.0).values()])
