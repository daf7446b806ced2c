"""Sharpness-aware minimisation: one ascent step of fixed length over all weights together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.errors import require_range
from robustflat.explanation import Cost, Explanation
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.types import AdvBatch, LossTerms


class Sam:
    """Gradient of the loss at w + rho * g / ||g||, g the gradient at w (Foret et al., ICLR 2021).

    The norm is taken over all trainable weights together, those of normalisation layers included and auxiliary
    heads left out. On adversarial images it is SAM with adversarial training (Wei et al., 2023); the images are
    crafted once, at w. It is `AdversarialWeights` with a global, absolute L2 ball.

    Args:
        rho: length of the step, >= 0 (usual: 0.05).
        warmup_epochs: number of epochs, >= 0, that are trained with the plain gradient first.
        statistics: "unperturbed", as is customary for SAM, or "perturbed"; see `AdversarialWeights`.

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(self, *, rho: float = 0.05, warmup_epochs: int = 0, statistics: str = "unperturbed") -> None:
        require_range("rho", rho, low=0)
        self._rule = AdversarialWeights(
            WeightBall(rho, grouping="global", relative=False),
            warmup_epochs=warmup_epochs,
            statistics=statistics,
            norm_layers=True,
        )
        self.rho = rho

    def explain(self) -> Explanation:
        """The gradient one step of length rho away."""
        note = f"the first {self._rule.warmup_epochs} epochs are plain" * (self._rule.warmup_epochs > 0)
        formula = f"g = grad L(w + {self.rho:g} g_0 / ||g_0||), g_0 = grad L(w), norm over all weights"
        return Explanation(formula, "Foret et al., ICLR 2021 (SAM); Wei et al., 2023", note=note)

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """Crafting and two scorings."""
        return craft + score.times(2, "2")

    def follow(self, *, epoch: int, step: int, generator: torch.Generator) -> None:
        """Take note of the progress of training, for the warm-up."""
        self._rule.follow(epoch=epoch, step=step, generator=generator)

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> dict[str, Tensor]:
        """Add the gradient at the displaced weights to `p.grad`; see `AdversarialWeights`."""
        return self._rule(model, next_batch, loss)
