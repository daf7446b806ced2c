"""What a flatness measurement returns: losses at displaced weights, and all that is needed to read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustflat.errors import UserError, require_one_of
from robustflat.flatness.trace import mean_of

REDUCTIONS = ("mean", "max")

CONVERGED = 0.05
"""Share of the value that late steps and restarts may add in a search that counts as converged."""


@dataclass(frozen=True, eq=False)
class FlatnessResult:
    """Losses of T trials and the reference, on N examples, with all settings of the measurement.

    flatness = reduce over trials of (mean loss at w + nu) - (mean reference loss at w); both means over
    examples. Where examples were measured in groups with a displacement each (the paper: one per batch), "max"
    takes the largest loss of every group, as each group has a maximisation of its own.

    Attributes:
        losses: (T, N) loss of each example at the weights of each trial, on the CPU.
        reference: (N,) loss at the undisplaced weights.
        reduction: "mean" (average case) or "max" (worst case).
        groups: sizes of the groups of examples that share a displacement, in order; they sum to N.
        loss: "robust" (attacked again at every displacement), "clean", or "frozen" (adversarial examples of w).
        radius: of the ball in weight space.
        ball: that ball in words.
        protocol: "paper" or "released".
        sampling: how displacements are drawn or started: "ball", "sphere" or "uniform_norm".
        parameters: in words, which parameters are displaced.
        tensors, weights: how many parameter tensors, and numbers in them, are displaced.
        attack: the attack in words; "none" for clean loss.
        reference_attack: how the reference was attacked, in words.
        batch_norm: "running" statistics, or "recalibrate".
        precision: floating-point type of the network.
        seed: of all draws.
        seconds: duration.
        search: what attacks or ascents searched on: "plain", "fp32" or "bf16"; the plain network judged.
        trace: worst case only: (T, S+1) mean loss minus reference of the best point after s steps.
    """

    losses: Tensor
    reference: Tensor
    reduction: str
    groups: tuple[int, ...]
    loss: str
    radius: float
    ball: str
    protocol: str
    sampling: str
    parameters: str
    tensors: int
    weights: int
    attack: str
    reference_attack: str
    batch_norm: str
    precision: str
    seed: int
    seconds: float
    search: str = "plain"
    trace: Tensor | None = None

    def __post_init__(self) -> None:
        require_one_of("reduction", self.reduction, REDUCTIONS)
        if self.losses.ndim != 2 or self.losses.shape[1:] != self.reference.shape:
            raise UserError(
                f"FlatnessResult takes losses (T, N) and reference (N,), got {tuple(self.losses.shape)} and "
                f"{tuple(self.reference.shape)}."
            )
        if sum(self.groups) != self.reference.numel():
            raise UserError(f"groups must sum to the {self.reference.numel()} examples, got {sum(self.groups)}.")

    @property
    def trials(self) -> Tensor:
        """Flatness of each trial alone, float64 (T,): its mean loss minus the mean reference."""
        return (self.losses.double() - self.reference.double()).mean(dim=1)

    @property
    def reference_loss(self) -> float:
        """Mean loss at the undisplaced weights."""
        return float(self.reference.double().mean())

    @property
    def per_example(self) -> Tensor:
        """Contribution of each example, float64 (N,); their mean is `value`."""
        return rise_per_example(self.losses, self.reference, reduction=self.reduction, groups=self.groups)

    @property
    def value(self) -> float:
        """The flatness; the larger, the sharper."""
        return float(self.per_example.mean())

    @property
    def standard_error(self) -> float:
        """Standard error over trials of their mean; NaN with one trial.

        For "max" it tells how far restarts differ, not how far their maximum is from the true one: see `converged`.
        """
        return mean_of(self.trials).standard_error

    @property
    def standard_error_over_examples(self) -> float:
        """Standard error from the choice of examples, displacements taken as given; NaN with one example."""
        return mean_of(self.per_example).standard_error

    def value_against_trials(self) -> list[float]:
        """The value that the first t trials alone would have given, t = 1..T: has it converged?"""
        rises = self.losses.double() - self.reference.double()
        parts = torch.split(rises, list(self.groups), dim=1)
        means = torch.stack([part.mean(dim=1) for part in parts], dim=1)  # (T, groups)
        sizes = torch.tensor(self.groups, dtype=torch.float64) / sum(self.groups)
        if self.reduction == "max":
            return [float(v) for v in means.cummax(dim=0).values @ sizes]
        counts = torch.arange(1, len(means) + 1, dtype=torch.float64)
        return [float(v) for v in (means @ sizes).cumsum(dim=0) / counts]

    def value_against_steps(self) -> list[float]:
        """Worst case: highest of all restarts after s = 0..S steps; empty for measures without steps."""
        return [] if self.trace is None else [float(v) for v in self.trace.double().amax(dim=0)]

    @property
    def converged(self) -> bool | None:
        """Worst case: whether more steps or restarts promise little; None where that cannot be told.

        The last quarter of the steps, and the second half of the restarts, raised the value by at most
        `CONVERGED` of it. Needs at least four steps and two restarts.
        """
        gains = self._late_gains()
        return None if gains is None else max(gains) <= CONVERGED

    def convergence(self) -> str:
        """`converged` in words; empty for the average case, whose error is `standard_error`."""
        gains = self._late_gains()
        if gains is None:
            short = "convergence unknown: needs at least 4 steps and 2 restarts"
            return short if self.trace is not None else ""
        steps, restarts = (f"{100 * gain:.1f} %" for gain in gains)
        verdict = "converged" if self.converged else "not converged (more steps or restarts: a larger value)"
        return f"{verdict}: the last quarter of the steps added {steps}, the second half of the restarts {restarts}"

    def _late_gains(self) -> tuple[float, float] | None:
        steps, restarts = self.value_against_steps(), self.value_against_trials()
        if len(steps) < 5 or len(restarts) < 2:
            return None
        early = steps[len(steps) - 1 - (len(steps) - 1) // 4], restarts[(len(restarts) - 1) // 2]
        # Steps never go down in the paper's protocol, but may in the released one, where the last point counts.
        late = steps[-1], restarts[-1]
        by_steps, by_restarts = (abs(b - a) / max(abs(b), 1e-12) for a, b in zip(early, late, strict=True))
        return by_steps, by_restarts

    def to_dict(self, arrays: bool = False) -> dict[str, Any]:
        """Plain values for JSON; not-a-number becomes `None`. With `arrays`, the losses too, as lists."""
        plain: dict[str, Any] = {
            "value": self.value,
            "standard_error": self.standard_error,
            "standard_error_over_examples": self.standard_error_over_examples,
            "reference_loss": self.reference_loss,
            "examples": self.reference.numel(),
            "trials": self.trials.tolist(),
            "value_against_trials": self.value_against_trials(),
            "value_against_steps": self.value_against_steps(),
            "converged": self.converged,
            "convergence": self.convergence(),
        }
        for name in _SETTINGS:
            plain[name] = getattr(self, name)
        plain["groups"] = list(self.groups)
        if arrays:
            plain |= {"losses": self.losses.tolist(), "reference": self.reference.tolist()}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}

    def __str__(self) -> str:
        """One line: value, uncertainty, and what was measured how."""
        count, drawn = len(self.losses), "draws" if self.reduction == "mean" else "restarts"
        if self.reduction == "mean":
            head = f"{self.value:.4g} +- {self.standard_error:.2g}" if count > 1 else f"{self.value:.4g}"
        else:
            head = f"{self.value:.4g}"
        case = "average" if self.reduction == "mean" else "worst"
        text = (
            f"{head} ({case}-case flatness of the {self.loss} loss, {self.ball}, {count} {drawn}, "
            f"{self.reference.numel()} examples in {len(self.groups)} group(s), {self.parameters}, attack "
            f"{self.attack}, {self.sampling} sampling, batch norm {self.batch_norm}, protocol {self.protocol}, "
            f"{self.precision}, search {self.search}, seed {self.seed}, {self.seconds:.1f} s)"
        )
        return text if self.trace is None else f"{text}; {self.convergence()}"


def rise_per_example(losses: Tensor, reference: Tensor, *, reduction: str, groups: Sequence[int]) -> Tensor:
    """Contribution of each example to the flatness, float64 (N,).

    Args:
        losses: (T, N) at the weights of each trial.
        reference: (N,) at the weights themselves.
        reduction: "mean" over trials, or "max": of every group the trial with the largest mean.
        groups: sizes of the groups of examples that share a displacement, in order.
    """
    rises = losses.double() - reference.double()
    if reduction == "mean":
        return rises.mean(dim=0)
    return torch.cat([part[part.mean(dim=1).argmax()] for part in torch.split(rises, list(groups), dim=1)])


_SETTINGS = (
    *(
        "reduction",
        "loss",
        "radius",
        "ball",
        "protocol",
        "sampling",
        "parameters",
        "tensors",
        "weights",
        "attack",
    ),
    *("reference_attack", "batch_norm", "precision", "search", "seed", "seconds"),
)
