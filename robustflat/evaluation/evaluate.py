"""The front door for any network in memory: clean and robust error in one call, without configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from robustflat.attacks.describe import describe
from robustflat.attacks.examples import Array, batches_for, require_module, searchable
from robustflat.attacks.nested import ball_of
from robustflat.attacks.pgd import Pgd
from robustflat.attacks.sanity import SanityReport, check_network, report
from robustflat.errors import UserError, require_one_of, require_range
from robustflat.evaluation import metrics
from robustflat.evaluation.attacked import attack_batches
from robustflat.evaluation.metrics import Interval
from robustflat.evaluation.paired import Comparison, compare_attacks, compare_clean
from robustflat.evaluation.predict import Prediction, predict
from robustflat.evaluation.rows import any_wrong
from robustflat.flatness.subject import require_evaluation_mode
from robustflat.geometry.input_ball import InputBall, L1Ball, L2Ball, LinfBall
from robustflat.models.precision import device_of, precision_of
from robustflat.ranks import workers
from robustflat.rng import generator_for
from robustflat.types import Attack

BALLS: Mapping[str, Callable[[float], InputBall]] = MappingProxyType({"linf": LinfBall, "l2": L2Ball, "l1": L1Ball})
"""Norm -> ball of that norm with a given epsilon."""

PGD_STEPS = 20
PGD_RESTARTS = 10
L1_SPARSITY = 0.05
STEP_SHARE = 0.007 / (8 / 255)
"""Step size as a share of epsilon: the paper's 0.007 at 8/255."""


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Clean and adversarial logits of one network, and how they were made; print it.

    An example is robustly wrong if it is wrong without attack or in any run; its robust loss is that of the worst run.

    Attributes:
        clean: logits (N, K) and labels (N,).
        runs: logits (R, N, K) of the runs of the attack.
        attack: the attack in words.
        norm, epsilon: the threat model.
        precision: floating-point type of the network.
        seed: of the attack.
        seconds: duration.
        sanity: checks of images, network, gradients and adversarial images.
    """

    clean: Prediction
    runs: Tensor
    attack: str
    norm: str
    epsilon: float
    precision: str
    seed: int
    seconds: float
    sanity: SanityReport

    @cached_property
    def adversarial(self) -> Prediction:
        """Logits (N, K) of the run with the highest loss per example, and labels (N,)."""
        return Prediction(metrics.worst_restart(self.runs, self.clean.labels), self.clean.labels)

    @property
    def restarts(self) -> int:
        """Number of runs of the attack."""
        return len(self.runs)

    @property
    def count(self) -> int:
        """Number of examples."""
        return self.clean.labels.numel()

    @property
    def error(self) -> float:
        """Fraction of examples that are wrong without attack."""
        return metrics.error(*self.clean)

    @property
    def robust_error(self) -> float:
        """Fraction of examples that are wrong without or with attack."""
        return float(self.robustly_wrong.double().mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy on the images."""
        return metrics.loss(*self.clean)

    @property
    def robust_loss(self) -> float:
        """Mean cross-entropy on the adversarial images."""
        return metrics.loss(*self.adversarial)

    @property
    def robustly_wrong(self) -> Tensor:
        """Which examples are wrong without attack or in any run, bool (N,)."""
        return any_wrong(self.clean.logits, self.runs, self.clean.labels)

    @property
    def error_interval(self) -> Interval:
        """95 % Wilson interval of the error."""
        return metrics.wilson_interval(int(metrics.wrong(*self.clean).sum()), self.count)

    @property
    def robust_error_interval(self) -> Interval:
        """95 % Wilson interval of the robust error."""
        return metrics.wilson_interval(int(self.robustly_wrong.sum()), self.count)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        losses = metrics.loss_per_example(*self.clean), metrics.loss_per_example(*self.adversarial)
        errors = [metrics.standard_error(values) for values in losses]
        return {
            "examples": self.count,
            "error": self.error,
            "error_interval": list(self.error_interval),
            "robust_error": self.robust_error,
            "robust_error_interval": list(self.robust_error_interval),
            "loss": self.loss,
            "loss_standard_error": errors[0] if math.isfinite(errors[0]) else None,
            "robust_loss": self.robust_loss,
            "robust_loss_standard_error": errors[1] if math.isfinite(errors[1]) else None,
            "attack": self.attack,
            "restarts": self.restarts,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "precision": self.precision,
            "seed": self.seed,
            "seconds": self.seconds,
            "sanity": [finding._asdict() for finding in self.sanity.findings],
        }

    def compare(self, other: EvaluationResult, *, seed: int = 0) -> Comparison:
        """Paired tests against another network on the same examples; print it.

        Args:
            other: evaluated on the same images in the same order, under the same threat model.
            seed: of the bootstrap.

        Raises:
            UserError: if examples or threat models differ.
        """
        if (self.norm, self.epsilon) != (other.norm, other.epsilon):
            raise UserError(
                f"The networks were evaluated under different threat models: {self.norm} {self.epsilon:g} and "
                f"{other.norm} {other.epsilon:g}."
            )
        runs = [result.runs for result in (self, other)]
        clean = [result.clean.logits for result in (self, other)]
        if not torch.equal(self.clean.labels, other.clean.labels):
            raise UserError("The two results are about different examples: their labels differ.")
        return Comparison(
            (
                *compare_clean(clean[0], clean[1], self.clean.labels, seed=seed),
                *compare_attacks("attack", (clean[0], runs[0]), (clean[1], runs[1]), self.clean.labels, seed=seed),
            )
        )

    def __str__(self) -> str:
        """A few lines for people."""
        runs = f", worst of {self.restarts} runs" if self.restarts > 1 else ""
        return "\n".join(
            [
                f"{self.count} examples, {self.norm} epsilon {self.epsilon:.6g}, {self.precision}, "
                f"seed {self.seed}, {self.seconds:.1f} s",
                f"attack        {self.attack}{runs}",
                f"error         {_percent(self.error, self.error_interval)}",
                f"robust error  {_percent(self.robust_error, self.robust_error_interval)}",
                f"loss          {_with_error(self.clean)}",
                f"robust loss   {_with_error(self.adversarial)}",
                str(self.sanity),
            ]
        )


def _percent(value: float, interval: Interval) -> str:
    return f"{value:6.2%}  (95 % interval {interval.low:.2%} to {interval.high:.2%})"


def _with_error(prediction: Prediction) -> str:
    values = metrics.loss_per_example(*prediction)
    return f"{float(values.mean()):.4f} +- {metrics.standard_error(values):.4f}"


def standard_attack(norm: str, epsilon: float) -> Pgd:
    """PGD-20 in a ball of this norm, its step 0.223 epsilon (the paper's 0.007 at 8/255).

    Args:
        norm: "linf", "l2" or "l1".
        epsilon: radius, in [0, 1] units.

    Raises:
        UserError: for another norm, or an epsilon that this ball does not allow.
    """
    require_one_of("norm", norm, BALLS)
    ball = BALLS[norm](epsilon)
    sparsity = L1_SPARSITY if norm == "l1" else None
    return Pgd(ball, steps=PGD_STEPS, step_size=STEP_SHARE * epsilon, l1_sparsity=sparsity)


def evaluate(
    model: nn.Module,
    images: Array,
    labels: Array,
    *,
    norm: str = "linf",
    epsilon: float = 8 / 255,
    attack: Attack | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> EvaluationResult:
    """Clean and robust error and loss of a network.

    In a job of several processes it is computed by whoever calls it, unless within `robustflat.ranks.sharing_work`.

    >>> print(evaluate(model, images, labels, epsilon=8 / 255))  # doctest: +SKIP

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, K), with its own normalisation inside; left as found.
        images: floating point in [0, 1], or uint8; torch or NumPy.
        labels: integers (N,).
        norm, epsilon: threat model of the default attack: "linf", "l2" or "l1" and the radius in [0, 1] units.
        attack: run once instead of the default, PGD-20 with ten restarts. Its own ball then decides; `norm` and
            `epsilon` are taken from it where it has one.
        batch_size: examples per forward pass.
        seed: of the attack's draws, >= 0.

    Raises:
        UserError: if images, labels or the model's answers are not what they should be, or a layer is in training
            mode; the message says what is wrong.
    """
    require_range("seed", seed, low=0)
    require_one_of("norm", norm, BALLS)
    require_module(model)
    require_evaluation_mode(model)
    start = time.perf_counter()
    precision = precision_of(model)
    model, batches = searchable(model, batches_for(model, images, labels, batch_size=batch_size))
    chosen, restarts = (standard_attack(norm, epsilon), PGD_RESTARTS) if attack is None else (attack, 1)
    ball = ball_of(chosen)
    clean = predict(model, batches)
    device = device_of(model)
    threat = ball or BALLS[norm](epsilon)
    drawn = generator_for(seed, "sanity", device=device)
    sanity = workers().on_first(lambda: check_network(model, *batches[0], threat, drawn))
    generator = generator_for(seed, "evaluate", device=device)
    attacked = attack_batches(
        model,
        batches,
        chosen,
        ball=threat,
        runs=restarts,
        at_once=1,
        search="plain",
        generator=generator,
    )
    return EvaluationResult(
        clean=clean,
        runs=attacked.logits,
        attack=describe(chosen),
        norm=getattr(ball, "norm", norm),
        epsilon=float(getattr(ball, "epsilon", epsilon)),
        precision=precision,
        seed=seed,
        seconds=time.perf_counter() - start,
        sanity=report(sanity, attacked.findings),
    )
