"""The gradient of another rule, with every entry clipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.explanation import Cost, CountsPasses, Explanation, explanation_of, unknown_cost
from robustflat.types import AdvBatch, LossTerms


class Rule(Protocol):
    """A gradient rule; see `robustflat.training.trainer.GradientRule`."""

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> Mapping[str, Tensor]:
        """Fill `p.grad` of the model."""
        ...


class ClippedEntries:
    """Another rule's gradient, each entry clipped to [-maximum, maximum].

    The code released by Stutz et al. (ICCV 2021) trains "AT-AWP" so, with maximum 0.05: its one ascent step on the
    weights is taken after the last evaluation, so that only this clipping is left of the method.

    Args:
        rule: whose gradient it is, such as `Plain`.
        maximum: > 0.

    Raises:
        UserError: if maximum is not positive; on a call, if there were gradients already, which it would clip too.
    """

    def __init__(self, rule: Rule, *, maximum: float = 0.05) -> None:
        require_range("maximum", maximum, low=0, low_open=True)
        self.rule = rule
        self.maximum = maximum

    def explain(self) -> Explanation:
        """The rule inside, clipped."""
        inner = explanation_of(self.rule)
        formula = f"{inner.formula}; g <- clip(g, -{self.maximum:g}, {self.maximum:g}) entry by entry"
        source = "; ".join(filter(None, (inner.source, "clipping: released code of Stutz et al., ICCV 2021")))
        return Explanation(formula, source, note=inner.note)

    def step_cost(self, craft: Cost, score: Cost) -> Cost:
        """That of the rule inside."""
        if isinstance(self.rule, CountsPasses):
            return self.rule.step_cost(craft, score)
        return unknown_cost(type(self.rule).__name__)

    def follow(self, *, epoch: int, step: int, generator: torch.Generator) -> None:
        """Hand on the progress of training to a rule that wants to know."""
        follow = getattr(self.rule, "follow", None)
        if follow is not None:
            follow(epoch=epoch, step=step, generator=generator)

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> Mapping[str, Tensor]:
        """Fill `p.grad` by the rule and clip it; returns what the rule returns."""
        if any(p.grad is not None for p in model.parameters()):
            raise UserError("gradients of an earlier batch are still there: call optimizer.zero_grad() before.")
        parts = self.rule(model, next_batch, loss)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.clamp_(-self.maximum, self.maximum)
        return parts
