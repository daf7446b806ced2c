"""The shared vocabulary: what a batch, an attack's result and a loss are called everywhere.

Shapes: B examples, C channels, H x W pixels, K classes, N examples of a whole set, T trials.
*Images* are float32 (B, C, H, W) in [0, 1]; *labels* int64 (B,), or float (B, K) probabilities where labels are
mixed; *logits* (B, K); a *per-example* tensor is (B,). Losses are in nats, epsilons in [0, 1] units
(8/255 = 0.03137).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Weights: TypeAlias = dict[str, Tensor]
"""Parameter name -> tensor of that parameter's shape. One "layer" is one tensor."""

Forward: TypeAlias = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] -> logits (B, K). An `nn.Module` is one."""

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,) or probabilities (B, K)) -> per-example value (B,), which an attack maximises."""

Scalars: TypeAlias = Mapping[str, float]


class Batch(NamedTuple):
    """Images x (B, C, H, W) in [0, 1] and labels y, int64 (B,) or float probabilities (B, K)."""

    x: Tensor
    y: Tensor


class AdvBatch(NamedTuple):
    """Clean images x, adversarial images x_adv (both (B, C, H, W) in [0, 1]) and labels y."""

    x: Tensor
    x_adv: Tensor
    y: Tensor


class Found(NamedTuple):
    """What an attack returns: x_adv (B, C, H, W), its objective value (B,), and fooled (B,) bool."""

    x_adv: Tensor
    value: Tensor
    fooled: Tensor


class LossTerms(NamedTuple):
    """A training loss: total (0-dim, differentiable) and its parts (detached, unscaled 0-dim tensors)."""

    total: Tensor
    parts: dict[str, Tensor]


@runtime_checkable
class Attack(Protocol):
    """Searches, for each image, a nearby image that maximises an objective of the logits.

    The result lies in the attack's ball and in [0, 1]; its objective is at least that of the start of the
    search; the same generator state gives the same result; model mode, gradients and batch-norm statistics
    stay as they were; `x` is not modified.
    """

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Attack images x (B, C, H, W) in [0, 1] with labels y; objective `None`: the attack's own."""
        ...


class Logger(Protocol):
    """Takes named numbers at a step; see `robustflat.loggers`."""

    def log(self, metrics: Scalars, *, step: int) -> None:
        """Record `metrics` at optimizer step `step`."""
        ...

    def finish(self, status: str) -> None:
        """Close; status is 'done', 'failed', 'interrupted' or 'stopped'."""
        ...
