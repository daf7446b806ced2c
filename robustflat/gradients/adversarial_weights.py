"""Adversarial weight perturbation: the gradient of a step is taken at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from robustflat.errors import require_one_of, require_range
from robustflat.explanation import Cost, Explanation
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.plain import Plain
from robustflat.gradients.shared import backward, loss_and_gradient
from robustflat.models.modes import displaced, frozen_statistics, perturbable
from robustflat.types import AdvBatch, LossTerms, Weights

STATISTICS = ("perturbed", "unperturbed")


class AdversarialWeights:
    """Gradient of the loss at w + nu, where nu in the ball makes the loss on the same batch large.

    Wu et al., NeurIPS 2020 (AWP). With the ball of the paper, relative and per layer, one step is
    nu_l = radius * ||w_l|| * g_l / ||g_l|| with g the gradient at w. With any loss: TRADES makes it TRADES-AWP.
    The images are crafted once, at w. Cost of a step: `steps` more forward and backward passes.

    The ascent is in train mode. Its passes and those at w + nu together leave the traces of one ordinary
    scoring in the running statistics of batch norm, and the weights come back bit for bit. (The code released
    by Stutz et al. takes its only ascent step after the last evaluation and so trains at w, with each entry of
    the gradient clipped at 0.05; neither is done here.)

    Args:
        ball: where nu may lie.
        steps: ascent steps, >= 1.
        step_size: length of one step, > 0, measured like the ball's radius: 0.01 is a step of 1 % of the norm where
            the ball is relative. `None`: radius / steps.
        warmup_epochs: number of epochs, >= 0, that are trained with the plain gradient first (authors of AWP: 0
            for AT, 10 for TRADES). Counted in the epochs that `follow` reports.
        statistics: which weights the running statistics are those of. "perturbed": w + nu, as in the AWP
            authors' code. "unperturbed": w, which are the weights evaluated later; the same cost.
        norm_layers, biases: whether those weights are perturbed too; see `perturbable`. (The authors' code moves
            tensors of more than one dimension only: `biases=False`.)

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(
        self,
        ball: WeightBall,
        *,
        steps: int = 1,
        step_size: float | None = None,
        warmup_epochs: int = 0,
        statistics: str = "perturbed",
        norm_layers: bool = False,
        biases: bool = True,
    ) -> None:
        require_range("steps", steps, low=1, hint="For no perturbation use trainer/gradient=plain.")
        require_range("warmup_epochs", warmup_epochs, low=0)
        require_one_of("statistics", statistics, STATISTICS)
        if step_size is not None:
            require_range("step_size", step_size, low=0, low_open=True)
        length = ball.radius / steps if step_size is None else step_size
        self.ball = ball
        self.step_ball = WeightBall(length, ball.norm, ball.grouping, ball.relative)
        self.steps = steps
        self.warmup_epochs = warmup_epochs
        self.statistics = statistics
        self.norm_layers, self.biases = norm_layers, biases
        self._epoch = 0
        self._plain = Plain()

    def explain(self) -> Explanation:
        """Ascent on the weights, then the gradient there."""
        ball = self.ball
        limit = f"{ball.radius:g} ||w_l||" if ball.relative else f"{ball.radius:g}"
        step = f"nu_l <- project(nu_l + {self.step_ball.radius:g}{' ||w_l||' * ball.relative} g_l / ||g_l||)"
        formula = (
            f"g = grad L(w + nu), nu maximises L(w + nu) within ||nu_l|| <= {limit} by k = {self.steps} steps {step}"
        )
        per = f"norms over: {ball.grouping}" + (
            f"; the first {self.warmup_epochs} epochs are plain" * (self.warmup_epochs > 0)
        )
        return Explanation(formula, "Wu et al., NeurIPS 2020 (AWP)", note=per)

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """Crafting, and a scoring for each ascent step and at the end; the warm-up spares the ascent."""
        return craft + score.times(self.steps + 1, "(k + 1)", k=self.steps)

    def follow(self, *, epoch: int, step: int, generator: torch.Generator) -> None:
        """Take note of the progress of training: finished epochs, of which the warm-up is counted."""
        self._epoch = epoch

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> dict[str, Tensor]:
        """Add the gradient at w + nu to `p.grad`; see `Plain`.

        Returns:
            The parts of the loss at w + nu, and "weight_ascent", by how much its total is above that at w.

        Raises:
            UserError: if the model has no weights that may be perturbed.
        """
        if self._epoch < self.warmup_epochs:
            return self._plain(model, next_batch, loss)
        batch = next_batch()
        nu, before = self._ascend(model, batch, loss)
        frozen_here = frozen_statistics(model) if self.statistics == "unperturbed" else nullcontext()
        with displaced(model, nu), frozen_here:
            terms = loss(batch)
            backward(terms.total, model)
        return {**terms.parts, "weight_ascent": terms.total.detach() - before}

    def _ascend(
        self, model: nn.Module, batch: AdvBatch, loss: Callable[[AdvBatch], LossTerms]
    ) -> tuple[Weights, Tensor]:
        """The perturbation nu, and the loss at w."""
        w = {name: view.clone() for name, view in self._chosen(model).items()}
        nu = {name: torch.zeros_like(weight) for name, weight in w.items()}
        before: Tensor | None = None
        for _ in range(self.steps):
            first = before is None  # at w itself, because nu is still zero
            counts = first and self.statistics == "unperturbed"
            with displaced(model, nu), nullcontext() if counts else frozen_statistics(model):
                total, gradient = loss_and_gradient(model, list(w), lambda: loss(batch))
            before = total if before is None else before
            step = self.step_ball.steepest(gradient, w)
            nu = self.ball.project({name: nu[name] + step[name] for name in nu}, w)
        assert before is not None
        return nu, before

    def _chosen(self, model: nn.Module) -> Weights:
        return perturbable(model, norm_layers=self.norm_layers, biases=self.biases)
