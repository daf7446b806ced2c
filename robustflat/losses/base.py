"""What every training loss shares: how an adversarial batch is crafted, and the numbers that are logged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from robustflat.attacks.objectives import labels_of
from robustflat.attacks.pgd import NoAttack
from robustflat.errors import require_one_of
from robustflat.explanation import BACKWARD, FORWARD, NOTHING, Cost, Explanation, explanation_of
from robustflat.models.modes import evaluating, frozen, frozen_statistics
from robustflat.types import AdvBatch, Attack, Batch, Forward, LossTerms, Objective

ATTACK_MODES = ("eval", "train")


class TrainingLoss(ABC):
    """A loss that says both which images to train on (`craft`) and how to score them (`__call__`).

    Crafting is separate from scoring so that a gradient rule can score one batch at several weights without
    attacking again.

    Args:
        attack_mode: batch norm during the attack. "eval": running statistics, as in the paper, TRADES and MART.
            "train": the model in the mode it is found in, thus with the statistics of the attacked batch, which
            the attack leaves out of the running ones. The choice changes results (Pang et al., ICLR 2021).

    Raises:
        UserError: for another attack_mode.
    """

    def __init__(self, *, attack_mode: str = "eval") -> None:
        require_one_of("attack_mode", attack_mode, ATTACK_MODES)
        self.attack_mode = attack_mode

    def objective(self, model: nn.Module, batch: Batch) -> tuple[Objective | None, Tensor]:
        """What the attack maximises, and the labels it gets: here the attack's own choice and the true ones.

        The mode of the model is the caller's business; `craft` sets it.

        Args:
            model: images -> logits.
            batch: images x (B, C, H, W) and labels y.

        Returns:
            Objective (`None`: the attack's own) and its y, one entry per example.
        """
        return None, batch.y

    def craft(
        self, model: nn.Module, attack: Attack, batch: Batch, generator: torch.Generator | None = None
    ) -> AdvBatch:
        """Attack a batch; weights, gradients, mode and batch-norm statistics of the model stay as they are.

        Args:
            model: images -> logits.
            attack: searches x_adv.
            batch: images x (B, C, H, W) in [0, 1] and labels y.
            generator: source of the attack's random draws.

        Returns:
            x, x_adv and the true labels y, whatever labels the attack saw.
        """
        if isinstance(attack, NoAttack):  # spare the forward pass that would only judge the clean images
            return AdvBatch(batch.x, batch.x, batch.y)
        with ExitStack() as state:
            state.enter_context(frozen(model))
            forward: Forward = model
            if self.attack_mode == "eval":
                state.enter_context(evaluating(model))
            else:
                state.enter_context(frozen_statistics(model))
                forward = partial(model)  # attacks put a bare module into eval mode, a callable they leave alone
            objective, y = self.objective(model, batch)
            found = attack(forward, batch.x, y, objective, generator)
        return AdvBatch(batch.x, found.x_adv.detach(), batch.y)

    def craft_cost(self, attack: Attack) -> Cost:
        """Passes that `craft` takes for one batch: those of the attack, and none without one."""
        return NOTHING if isinstance(attack, NoAttack) else explanation_of(attack).cost

    @abstractmethod
    def explain(self) -> Explanation:
        """Formula, source, and the cost of scoring a batch with its gradient by all weights."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: AdvBatch, generator: torch.Generator | None = None) -> LossTerms:
        """Score a crafted batch in the mode the model is in.

        Args:
            model: images -> logits (B, K).
            batch: clean images, adversarial images and labels.
            generator: source of random draws of the loss itself, if it makes any.

        Returns:
            Total loss and parts; these include "loss" (the total) and "error" (share of x_adv misclassified).
        """


ONE_SCORING = FORWARD + BACKWARD
"""One forward and one backward pass."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in their own precision if that is float32 or better, otherwise in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def error_rate(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the examples whose largest logit (B, K) is not that of the label y; 0-dim, without gradient."""
    return (logits.detach().argmax(dim=1) != labels_of(y)).float().mean()
