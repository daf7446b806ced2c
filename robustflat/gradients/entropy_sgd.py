"""Entropy-SGD: the direction to the mean of a short random walk from the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.explanation import Cost, Explanation
from robustflat.gradients.shared import loss_and_gradient
from robustflat.models.modes import displaced
from robustflat.types import AdvBatch, LossTerms


class EntropySgd:
    """Gradient of the local entropy, estimated by L inner steps (Chaudhari et al., ICLR 2017).

    From w' = mu = w, repeated L times, each time with a new batch crafted at w':

        d = gradient(w') + weight_decay * w' - gamma * (w - w') + noise / sqrt(inner_lr / 2) * N(0, 1)
        w' <- w' - inner_lr * d;   mu <- averaging * mu + (1 - averaging) * w'

    after which w comes back bit for bit and `p.grad` is w - mu; learning rate, momentum and weight decay are
    the optimizer's. As in the code released by Stutz et al. (ICCV 2021), the factor gamma of the outer
    gradient is left to the learning rate. Other than there, the schedule and momentum take effect, gamma can
    grow as the authors of Entropy-SGD have it, and no batch is drawn only to be logged: a step uses L batches,
    so an equal number of passes means 1/L of the epochs. Batch norm's running statistics see the inner passes.

    Args:
        inner_steps: L >= 1 (Stutz et al.: 1, 2, 3, 5).
        inner_lr: inner learning rate, > 0.
        gamma: strength of the pull back to w, in [0, 1 / inner_lr].
        gamma_growth: growth of gamma per optimizer step, >= 0: gamma * (1 + gamma_growth)^t ("scoping"), at
            most 1 / inner_lr, with which an inner step returns all the way.
        noise: scale of the Langevin noise, >= 0.
        averaging: share of the old mean, in [0, 1).
        weight_decay: of the inner steps, >= 0.

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(
        self,
        *,
        inner_steps: int = 1,
        inner_lr: float = 0.1,
        gamma: float = 1e-4,
        gamma_growth: float = 0.0,
        noise: float = 1e-4,
        averaging: float = 0.75,
        weight_decay: float = 5e-4,
    ) -> None:
        require_range("inner_steps", inner_steps, low=1)
        require_range("inner_lr", inner_lr, low=0, low_open=True)
        require_range("gamma", gamma, low=0, high=1 / inner_lr, hint="The upper end is 1 / inner_lr.")
        require_range("gamma_growth", gamma_growth, low=0)
        require_range("noise", noise, low=0)
        require_range("averaging", averaging, low=0, high=1, high_open=True)
        require_range("weight_decay", weight_decay, low=0)
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.gamma, self.gamma_growth = gamma, gamma_growth
        self.noise, self.averaging, self.weight_decay = noise, averaging, weight_decay
        self._step = 0
        self._generator: torch.Generator | None = None

    def explain(self) -> Explanation:
        """The direction to the mean of the walk."""
        walk = f"w' <- w' - {self.inner_lr:g} (grad L(w') + {self.weight_decay:g} w' - gamma (w - w') + noise)"
        mean = f"mu <- {self.averaging:g} mu + {1 - self.averaging:g} w'"
        formula = f"g = w - mu, after L = {self.inner_steps} times {walk}, {mean}; gamma = {self.gamma:g}"
        if self.gamma_growth:
            formula += f" (1 + {self.gamma_growth:g})^t"
        note = f"noise {self.noise:g} / sqrt({self.inner_lr:g} / 2) N(0, 1); a new batch for each inner step"
        return Explanation(formula, "Chaudhari et al., ICLR 2017 (Entropy-SGD); Stutz et al., ICCV 2021", note=note)

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """Crafting and scoring, once for each inner step."""
        return (craft + score).times(self.inner_steps, "L", L=self.inner_steps)

    def follow(self, *, epoch: int, step: int, generator: torch.Generator) -> None:
        """Take note of the optimizer steps done, by which gamma grows, and of the generator to draw from."""
        self._step, self._generator = step, generator

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> dict[str, Tensor]:
        """Add w - mu to `p.grad` of every trainable parameter, and return the mean parts of the inner losses.

        Raises:
            UserError: if the model has no trainable weights.
        """
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise UserError("the model has no trainable weights for Entropy-SGD to move.")
        w = [p.detach().clone() for p in parameters.values()]
        mu = [p.clone() for p in w]
        means: dict[str, Tensor] = {}
        with displaced(model, {name: torch.zeros_like(p) for name, p in parameters.items()}):
            for _ in range(self.inner_steps):
                parts = self._walk(model, parameters, w, next_batch(), loss)
                torch._foreach_lerp_(mu, [p.detach() for p in parameters.values()], 1 - self.averaging)
                for name, value in parts.items():
                    means[name] = means.get(name, 0.0) + value / self.inner_steps
        for p, start, mean in zip(parameters.values(), w, mu, strict=True):
            p.grad = start - mean if p.grad is None else p.grad + (start - mean)
        return means

    def _walk(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        w: list[Tensor],
        batch: AdvBatch,
        loss: Callable[[AdvBatch], LossTerms],
    ) -> dict[str, Tensor]:
        """One inner step, in place; returns the parts of the loss before it."""
        parts: dict[str, Tensor] = {}

        def score() -> LossTerms:
            terms = loss(batch)
            parts.update(terms.parts)
            return terms

        _, gradient = loss_and_gradient(model, list(parameters), score)
        gamma, scale = self._gamma(), self.noise / math.sqrt(self.inner_lr / 2)
        with torch.no_grad():
            for (name, p), start in zip(parameters.items(), w, strict=True):
                direction = gradient[name] + self.weight_decay * p - gamma * (start - p)
                if scale:
                    direction += scale * self._normal(p)
                p.sub_(direction, alpha=self.inner_lr)
        return parts

    def _gamma(self) -> float:
        growth = math.exp(min(self._step * math.log1p(self.gamma_growth), 700))  # stays a finite float
        return min(self.gamma * growth, 1 / self.inner_lr)

    def _normal(self, p: Tensor) -> Tensor:
        device = p.device if self._generator is None else self._generator.device
        return torch.randn(p.shape, generator=self._generator, dtype=p.dtype, device=device).to(p.device)
