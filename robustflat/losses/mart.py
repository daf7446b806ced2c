"""MART: boosted cross-entropy plus a divergence in which misclassified examples weigh more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError, require_range
from robustflat.explanation import Explanation
from robustflat.losses.base import ONE_SCORING, TrainingLoss, error_rate
from robustflat.losses.trades import clean_and_adversarial_logits
from robustflat.types import AdvBatch, LossTerms


class Mart(TrainingLoss):
    """Misclassification-aware adversarial training (Wang et al., ICLR 2020), batch mean of

    -log p'_y - log(1 - max_{k != y} p'_k) + beta * KL(p || p') * (1 - p_y)

    with p = p(x), p' = p(x_adv) and gradients through everything. The attack maximises cross-entropy. As in
    the paper's released code the second logarithm is of 1.0001 - p'_k, so that a certain mistake costs 9.2
    nats instead of infinitely many; the other small constants there are not needed in the log domain.

    Args:
        beta: weight of the divergence, >= 0.
        joint_forward: as in `Trades`.
        attack_mode: see `TrainingLoss`.

    Raises:
        UserError: if beta is negative.
    """

    def __init__(self, *, beta: float = 6.0, joint_forward: bool = False, attack_mode: str = "eval") -> None:
        super().__init__(attack_mode=attack_mode)
        require_range("beta", beta, low=0)
        self.beta = beta
        self.joint_forward = joint_forward

    def explain(self) -> Explanation:
        """Two scorings: clean and adversarial images."""
        boosted = "BCE(p', y) = -log p'_y - log(1.0001 - max_{k != y} p'_k)"
        formula = (
            f"L = BCE(p(x'), y) + {self.beta:g} KL(p(x) || p(x')) (1 - p_y(x)), {boosted}; x' maximises CE(f(x'), y)"
        )
        return Explanation(formula, "Wang et al., ICLR 2020 (MART)", ONE_SCORING.times(2, "2"))

    def __call__(self, model: nn.Module, batch: AdvBatch, generator: torch.Generator | None = None) -> LossTerms:
        """MART loss; parts: loss, error (of x_adv), boosted_loss, clean_loss, clean_error, divergence.

        Raises:
            UserError: if the labels are mixed (probabilities instead of classes).
        """
        if batch.y.is_floating_point():
            raise UserError(
                "MART needs one class per image, got label probabilities (B, K). Remove the augmentation that "
                "mixes labels, or use trainer=trades."
            )
        clean, adversarial = clean_and_adversarial_logits(model, batch, joint=self.joint_forward)
        boosted = _boosted_cross_entropy(adversarial, batch.y)
        log_p, log_q = clean.log_softmax(dim=1), adversarial.log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - log_q)).sum(dim=1)
        weighted = ((1 - p.gather(1, batch.y[:, None])[:, 0]) * divergence).mean()
        total = boosted + self.beta * weighted
        parts = {
            "loss": total.detach(),
            "error": error_rate(adversarial, batch.y),
            "boosted_loss": boosted.detach(),
            "clean_loss": F.cross_entropy(clean.detach(), batch.y),
            "clean_error": error_rate(clean, batch.y),
            "divergence": weighted.detach(),
        }
        return LossTerms(total, parts)


def _boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean of -log p_y - log(1.0001 - max_{k != y} p_k), 0-dim."""
    log_p = logits.log_softmax(dim=1)
    label = y[:, None]
    strongest_other = log_p.exp().scatter(1, label, 0.0).amax(dim=1)
    return -(log_p.gather(1, label)[:, 0] + (1.0001 - strongest_other).log()).mean()
