"""Cross-entropy on the crafted images: standard and adversarial training, label smoothing, label noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from robustflat.errors import require_one_of, require_range
from robustflat.explanation import Explanation
from robustflat.losses.base import ONE_SCORING, TrainingLoss, at_least_float32, error_rate
from robustflat.losses.labels import SMOOTHING_TARGETS, as_probabilities, noisy, smoothed
from robustflat.types import AdvBatch, LossTerms


class CrossEntropy(TrainingLoss):
    """Mean cross-entropy -log p_y(x_adv) (Madry et al., ICLR 2018).

    With `attack=none` this is standard training. With the wrapper `Fraction` around the attack, the clean
    examples and the attacked ones go through the network together and each example weighs the same, so the
    clean ones count by their own share (the paper's released code swaps the two shares).

    Smoothing and noise change only what the weights are trained on: attacks and the logged error see the true
    labels.

    Args:
        label_smoothing: tau in [0, 1].
        label_smoothing_target: "paper": 1 - tau on the label, tau / (K - 1) on each other class. "uniform":
            tau / K on every class and 1 - tau more on the label.
        label_noise: probability in [0, 1] with which each label is replaced by one uniform over all K classes,
            drawn anew at every call.
        attack_mode: see `TrainingLoss`.

    Raises:
        UserError: for values outside these ranges.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        label_smoothing_target: str = "paper",
        label_noise: float = 0.0,
        attack_mode: str = "eval",
    ) -> None:
        super().__init__(attack_mode=attack_mode)
        require_range("label_smoothing", label_smoothing, low=0, high=1)
        require_range("label_noise", label_noise, low=0, high=1)
        require_one_of("label_smoothing_target", label_smoothing_target, SMOOTHING_TARGETS)
        self.label_smoothing = label_smoothing
        self.label_smoothing_target = label_smoothing_target
        self.label_noise = label_noise

    def explain(self) -> Explanation:
        """Cross-entropy with the labels as they are changed."""
        target, sources = "y", ["Madry et al., ICLR 2018"]
        if self.label_noise:
            target = f"noisy(y), each label drawn anew from all K classes with probability {self.label_noise:g}"
            sources.append("label noise: Stutz et al., ICCV 2021")
        if self.label_smoothing:
            tau, paper = self.label_smoothing, self.label_smoothing_target == "paper"
            shares = "1 - tau on y, tau / (K - 1) elsewhere" if paper else "(1 - tau) y + tau / K"
            target = f"smooth({target}), {shares}, tau = {tau:g}"
            sources.append("label smoothing: " + ("Stutz et al., ICCV 2021" if paper else "Szegedy et al., CVPR 2016"))
        formula = f"L = CE(f(x'), {target}); x' maximises CE(f(x'), y)"
        return Explanation(formula, "; ".join(sources), ONE_SCORING)

    def __call__(self, model: nn.Module, batch: AdvBatch, generator: torch.Generator | None = None) -> LossTerms:
        """Cross-entropy of x_adv; see `TrainingLoss`."""
        logits = at_least_float32(model(batch.x_adv))
        y, classes = batch.y, logits.shape[1]
        if self.label_noise > 0:
            y = noisy(y, classes, amount=self.label_noise, generator=generator)
        if self.label_smoothing > 0:
            exact = as_probabilities(y, classes).to(logits.dtype)  # so that tau is not rounded to float32
            y = smoothed(exact, classes, amount=self.label_smoothing, target=self.label_smoothing_target)
        total = F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y)
        return LossTerms(total, {"loss": total.detach(), "error": error_rate(logits, batch.y)})
