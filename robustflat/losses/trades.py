"""TRADES: clean cross-entropy plus the divergence between clean and adversarial predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.objectives import kl_divergence
from robustflat.attacks.pgd import NoAttack
from robustflat.errors import require_one_of, require_range
from robustflat.explanation import FORWARD, Cost, Explanation
from robustflat.losses.base import ONE_SCORING, TrainingLoss, at_least_float32, error_rate
from robustflat.ranks import current
from robustflat.types import AdvBatch, Attack, Batch, LossTerms, Objective


class Trades(TrainingLoss):
    """CE(f(x), y) + beta * KL(p(x) || p(x_adv)), batch mean, gradients through both (Zhang et al., ICML 2019).

    The attack maximises the same divergence with p(x) fixed.

    Args:
        beta: weight of the divergence, >= 0 (1 / lambda in the TRADES paper, lambda in Stutz et al.).
        joint_forward: False, as in both papers' code: clean and adversarial images pass one after the other,
            each normalised by its own batch statistics, and batch norm's running statistics are updated twice,
            first by the clean and then by the adversarial half. True: both pass together in one batch of 2B
            with shared statistics and one update; fewer and larger kernels.
        attack_mode: see `TrainingLoss`; the clean prediction is made in the same mode.
        best_iterate: the attack keeps the iterate of largest divergence "per_example", or "per_batch": one for all,
            chosen by the mean, as the released code of Stutz et al. does. Its steps are the same in L-infinity.

    Raises:
        UserError: if beta is negative, or for another best_iterate.
    """

    def __init__(
        self,
        *,
        beta: float = 6.0,
        joint_forward: bool = False,
        attack_mode: str = "eval",
        best_iterate: str = "per_example",
    ) -> None:
        super().__init__(attack_mode=attack_mode)
        require_range("beta", beta, low=0)
        require_one_of("best_iterate", best_iterate, ("per_example", "per_batch"))
        self.beta = beta
        self.best_iterate = best_iterate
        self.joint_forward = joint_forward

    def explain(self) -> Explanation:
        """Two scorings: clean and adversarial images."""
        formula = f"L = CE(f(x), y) + {self.beta:g} KL(p(x) || p(x')); x' maximises KL(sg p(x) || p(x'))"
        return Explanation(formula, "Zhang et al., ICML 2019 (TRADES)", ONE_SCORING.times(2, "2"))

    def craft_cost(self, attack: Attack) -> Cost:
        """The attack, and a pass for the clean prediction that it goes away from."""
        cost = super().craft_cost(attack)
        return cost if isinstance(attack, NoAttack) else FORWARD + cost

    def objective(self, model: nn.Module, batch: Batch) -> tuple[Objective | None, Tensor]:
        """KL divergence from the clean prediction p(x), (B, K), which takes the place of the labels."""
        with torch.no_grad():
            probabilities = at_least_float32(model(batch.x)).softmax(dim=1)
        return kl_divergence if self.best_iterate == "per_example" else mean_divergence, probabilities

    def __call__(self, model: nn.Module, batch: AdvBatch, generator: torch.Generator | None = None) -> LossTerms:
        """TRADES loss; parts: loss, error (of x_adv), clean_loss, clean_error, divergence (without beta)."""
        clean, adversarial = clean_and_adversarial_logits(model, batch, joint=self.joint_forward)
        y = batch.y.to(clean.dtype) if batch.y.is_floating_point() else batch.y
        clean_loss = F.cross_entropy(clean, y)
        log_p, log_q = clean.log_softmax(dim=1), adversarial.log_softmax(dim=1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
        total = clean_loss + self.beta * divergence
        parts = {
            "loss": total.detach(),
            "error": error_rate(adversarial, batch.y),
            "clean_loss": clean_loss.detach(),
            "clean_error": error_rate(clean, batch.y),
            "divergence": divergence.detach(),
        }
        return LossTerms(total, parts)


def mean_divergence(logits: Tensor, y: Tensor) -> Tensor:
    """The batch mean of `kl_divergence`, given to every example, (B,); on several ranks that of the whole batch."""
    values = kl_divergence(logits, y)
    mean = values.mean()
    (whole,) = current().means([mean.detach()])
    return (mean + (whole - mean.detach())).expand(len(values)) if current().size > 1 else mean.expand(len(values))


def clean_and_adversarial_logits(model: nn.Module, batch: AdvBatch, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Logits of x and of x_adv, (B, K) each, in at least float32; `joint`: from one pass of 2B images."""
    if joint:
        clean, adversarial = model(torch.cat([batch.x, batch.x_adv])).chunk(2)
    else:
        clean, adversarial = model(batch.x), model(batch.x_adv)
    return at_least_float32(clean), at_least_float32(adversarial)
