"""Random weight perturbation: the gradient of a step is taken at randomly displaced weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from robustflat.errors import require_one_of, require_range
from robustflat.explanation import Cost, Explanation
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.plain import Plain
from robustflat.gradients.shared import backward
from robustflat.models.modes import displaced, frozen_statistics, perturbable
from robustflat.types import AdvBatch, LossTerms

SAMPLINGS = ("sphere", "ball", "uniform_norm")


class RandomWeights:
    """Mean over random nu of the gradient at w + nu, all on one batch: the control experiment of AWP.

    nu is drawn anew at each step. The images are crafted once, at w. Weights come back bit for bit, and batch
    norm's running statistics are updated by the first draw only, as one ordinary scoring would.

    Args:
        ball: where nu lies.
        population: number of draws per step, >= 1; each costs a forward and a backward pass.
        sampling: "sphere", "ball" or "uniform_norm"; see `WeightBall.sample`.
        warmup_epochs: number of epochs, >= 0, that are trained with the plain gradient first.
        norm_layers, biases: whether those weights are perturbed too; see `perturbable`.

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(
        self,
        ball: WeightBall,
        *,
        population: int = 1,
        sampling: str = "sphere",
        warmup_epochs: int = 0,
        norm_layers: bool = False,
        biases: bool = True,
    ) -> None:
        require_range("population", population, low=1)
        require_range("warmup_epochs", warmup_epochs, low=0)
        require_one_of("sampling", sampling, SAMPLINGS)
        self.ball = ball
        self.population = population
        self.sampling = sampling
        self.warmup_epochs = warmup_epochs
        self.norm_layers, self.biases = norm_layers, biases
        self._epoch = 0
        self._generator: torch.Generator | None = None
        self._plain = Plain()

    def explain(self) -> Explanation:
        """The mean gradient at random weights."""
        limit = f"{self.ball.radius:g}" + " ||w_l||" * self.ball.relative
        formula = f"g = mean of P = {self.population} grad L(w + nu), nu random, {self.sampling} of radius {limit}"
        note = f"the first {self.warmup_epochs} epochs are plain" * (self.warmup_epochs > 0)
        return Explanation(formula, "control experiment of AWP (Wu et al., NeurIPS 2020)", note=note)

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """Crafting, and a scoring for each draw."""
        return craft + score.times(self.population, "P", P=self.population)

    def follow(self, *, epoch: int, step: int, generator: torch.Generator) -> None:
        """Take note of the progress of training, and of the generator to draw from."""
        self._epoch, self._generator = epoch, generator

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> dict[str, Tensor]:
        """Add the mean gradient to `p.grad`, and return the mean parts of the loss; see `Plain`.

        Raises:
            UserError: if the model has no weights that may be perturbed.
        """
        if self._epoch < self.warmup_epochs:
            return self._plain(model, next_batch, loss)
        batch = next_batch()
        w = perturbable(model, norm_layers=self.norm_layers, biases=self.biases)
        means: dict[str, Tensor] = {}
        for draw in range(self.population):
            nu = self.ball.sample(w, self._generator, sampling=self.sampling)
            with displaced(model, nu), frozen_statistics(model) if draw else nullcontext():
                terms = loss(batch)
                backward(terms.total / self.population, model)
            for name, value in terms.parts.items():
                means[name] = means.get(name, 0.0) + value / self.population
        return means
