"""One adversarial training in plain values, and what the code released by Stutz et al. (ICCV 2021) does differently.

Used by `released_deviations.py`. Where the package has an option for a behaviour, it is used; the other behaviours,
which nobody should train with, are the small classes here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.attacks.pgd import Pgd
from robustflat.attacks.wrappers import Fraction, OnlyCorrect, PredictedLabels
from robustflat.data.augment import Flip, PadCrop, PadResize
from robustflat.geometry.input_ball import LinfBall
from robustflat.geometry.weight_ball import WeightBall
from robustflat.gradients.adversarial_weights import AdversarialWeights
from robustflat.gradients.clipped import ClippedEntries
from robustflat.gradients.entropy_sgd import EntropySgd
from robustflat.gradients.plain import Plain
from robustflat.losses.base import TrainingLoss, error_rate
from robustflat.losses.cross_entropy import CrossEntropy
from robustflat.losses.rotation import Rotation
from robustflat.losses.trades import Trades
from robustflat.models.resnet import resnet18
from robustflat.training.callbacks import Callback, ClipWeights, WeightAverage
from robustflat.training.optimizers import sgd
from robustflat.training.schedules import constant, cyclic, multistep
from robustflat.training.trainer import GradientRule
from robustflat.types import AdvBatch, Attack, Forward, Found, LossTerms, Objective


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One training method; the defaults are the paper's AT baseline, as it is described.

    Attributes:
        attack_seed: of the attack's random starts; another one gives an equivalent training.
        epsilon: radius of the L-infinity ball, in units of 1/255.
        start: where PGD begins, "uniform" or "uniform_norm".
        fraction: share of each batch that is attacked.
        shares: "own": clean and attacked examples weigh by their number; "swapped".
        labels: "true", or the predicted ones, by a pass in "eval" or "train" mode, are attacked.
        only_correct: "no", or misclassified images stay clean, judged by a pass in "eval" or "train" mode.
        loss: "cross_entropy", "trades" (beta 6) or "rotation" (weight 1).
        best_iterate: of TRADES' attack, chosen "per_example" or "per_batch".
        smoothing, smoothing_target: of labels.
        head_clamp: cut the features of the rotation head to [0, 1].
        augment: "crop" or "resize" after padding by up to 4 pixels.
        activation: of the network.
        zero_residuals: residual branches start at exactly zero (scale 1 + weight = 0 in rebn).
        gradient: "plain", "awp" (radius 0.01), "clipped" (entries to 0.05) or "entropy_sgd" (2 inner steps).
        extra_batch: Entropy-SGD scores one more batch per step, only to log it.
        gamma_growth: of Entropy-SGD's pull, per step.
        momentum: of SGD; Nesterov if positive.
        schedule: "multistep", "constant" or "cyclic".
        cycles: of the cyclic schedule.
        clip: largest weight, as a share of 1 / sqrt(channels); 0: no clipping.
        clip_norms: clip scales and shifts of batch norm too.
        clip_when: "after_step" or "before_scoring".
        average: decay of a weight average, which is then what is evaluated; 0: none.
        average_statistics: batch norm's in the average, "average" or "copy".
        average_twice: one more update between two epochs.
    """

    attack_seed: int = 0
    epsilon: float = 8.0
    start: str = "uniform"
    fraction: float = 1.0
    shares: str = "own"
    labels: str = "true"
    only_correct: str = "no"
    loss: str = "cross_entropy"
    best_iterate: str = "per_example"
    smoothing: float = 0.0
    smoothing_target: str = "paper"
    head_clamp: bool = False
    augment: str = "crop"
    activation: str = "relu"
    zero_residuals: bool = False
    gradient: str = "plain"
    extra_batch: bool = False
    gamma_growth: float = 0.0
    momentum: float = 0.9
    schedule: str = "multistep"
    cycles: int = 1
    clip: float = 0.0
    clip_norms: bool = False
    clip_when: str = "after_step"
    average: float = 0.0
    average_statistics: str = "average"
    average_twice: bool = False


class SwappedShares(CrossEntropy):
    """The clean loss weighted by the share of the attacked examples, and the other way round.

    Args:
        fraction: share of each batch that is attacked.
    """

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction

    def __call__(self, model: nn.Module, batch: AdvBatch, generator: torch.Generator | None = None) -> LossTerms:
        """Cross-entropy of a batch whose first int((1 - fraction) * B) examples are clean."""
        logits = model(batch.x_adv)
        losses = F.cross_entropy(logits, batch.y, reduction="none")
        clean = int((1 - self.fraction) * len(losses) + 1e-9)
        share = clean / len(losses)
        total = (1 - share) * losses[:clean].mean() + share * losses[clean:].mean()
        return LossTerms(total, {"loss": total.detach(), "error": error_rate(logits, batch.y)})


class TrainModePass:
    """Attack with labels or images chosen by an extra pass in train mode, which moves batch norm's statistics.

    Args:
        attack: any attack.
        use: "labels": attack the predicted ones; "images": keep the misclassified ones clean.
    """

    def __init__(self, attack: Attack, use: str) -> None:
        self.attack = attack
        self.use = use

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """See `types.Attack`; other than the contract has it, statistics change."""
        assert isinstance(forward, nn.Module)
        with torch.no_grad():
            predicted = forward.train()(x).argmax(dim=1)
        forward.eval()
        found = self.attack(forward, x, predicted if self.use == "labels" else y, objective, generator)
        if self.use == "labels":
            return found
        wrong = (predicted != y)[:, None, None, None]
        return found._replace(x_adv=torch.where(wrong, x, found.x_adv))


class LoggedBatch(EntropySgd):
    """Entropy-SGD that scores a batch at w first, whose gradient is not used."""

    def __call__(
        self, model: nn.Module, next_batch: Callable[[], AdvBatch], loss: Callable[[AdvBatch], LossTerms]
    ) -> dict[str, Tensor]:
        """See `EntropySgd`."""
        with torch.no_grad():
            loss(next_batch())
        return super().__call__(model, next_batch, loss)


def network(setup: Setup, *, channels: int, mean: tuple[float, ...], std: tuple[float, ...], classes: int) -> nn.Module:
    """ResNet-18 with batch norm of scale 1 + weight; its weights are drawn from torch's own generator."""
    return resnet18(
        classes=classes,
        in_channels=len(mean),
        channels=channels,
        norm="rebn",
        activation=setup.activation,
        zero_residuals=setup.zero_residuals,
        auxiliary="clamped" if setup.head_clamp else setup.loss == "rotation",
        mean=mean,
        std=std,
    )


def attack(setup: Setup, steps: int) -> Attack:
    """What a batch undergoes."""
    made: Attack = Pgd(LinfBall(setup.epsilon / 255), steps=steps, step_size=0.007, random_start=setup.start)
    if setup.labels != "true":
        made = PredictedLabels(made) if setup.labels == "eval" else TrainModePass(made, "labels")
    if setup.only_correct != "no":
        made = OnlyCorrect(made) if setup.only_correct == "eval" else TrainModePass(made, "images")
    return made if setup.fraction == 1 else Fraction(made, setup.fraction)


def augmentations(setup: Setup) -> dict[str, Any]:
    """Of training images, in their order."""
    placed = PadCrop(padding=4) if setup.augment == "crop" else PadResize(max_pad=4)
    return {"place": placed, "flip": Flip()}


def loss(setup: Setup) -> TrainingLoss:
    """How a batch is crafted and scored."""
    if setup.loss == "trades":
        return Trades(best_iterate=setup.best_iterate)
    if setup.loss == "rotation":
        return Rotation(weight=1.0)
    if setup.shares == "swapped":
        return SwappedShares(setup.fraction)
    return CrossEntropy(label_smoothing=setup.smoothing, label_smoothing_target=setup.smoothing_target)


def gradient(setup: Setup) -> GradientRule:
    """At which weights the gradient is taken."""
    if setup.gradient == "awp":
        return AdversarialWeights(WeightBall(0.01, 2.0, "layer", True))
    if setup.gradient == "clipped":
        return ClippedEntries(Plain(), maximum=0.05)
    if setup.gradient == "entropy_sgd":
        rule = LoggedBatch if setup.extra_batch else EntropySgd
        return rule(inner_steps=2, gamma_growth=setup.gamma_growth)
    return Plain()


def optimizer(setup: Setup) -> Callable[..., Any]:
    """Model -> optimizer."""
    return partial(sgd, lr=0.05, momentum=setup.momentum, nesterov=setup.momentum > 0)


def schedule(setup: Setup) -> Callable[..., Any]:
    """(Optimizer, steps) -> schedule."""
    if setup.schedule == "cyclic":
        return partial(cyclic, peak=0.1, cycles=setup.cycles)
    return constant if setup.schedule == "constant" else multistep


def callbacks(setup: Setup, channels: int) -> dict[str, Callback]:
    """Clipping and averaging."""
    made: dict[str, Callback] = {}
    if setup.clip:
        largest = setup.clip / channels**0.5  # with the width grows the share of the initial weights that it cuts
        made["clip"] = ClipWeights(maximum=largest, norm_layers=setup.clip_norms, timing=setup.clip_when)
    if setup.average:
        made["average"] = WeightAverage(
            decay=setup.average, batch_norm=setup.average_statistics, twice_per_epoch=setup.average_twice
        )
    return made
