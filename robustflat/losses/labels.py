"""Labels that are not quite the true ones: smoothed and noisy."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from robustflat.rng import drawn_for_batch

SMOOTHING_TARGETS = ("paper", "uniform")


def as_probabilities(y: Tensor, classes: int) -> Tensor:
    """Labels int64 (B,) as one-hot rows, float32 (B, K); probabilities (B, K) stay as they are."""
    return y if y.is_floating_point() else F.one_hot(y, classes).float()


def smoothed(y: Tensor, classes: int, *, amount: float, target: str = "paper") -> Tensor:
    """Label smoothing: move a share of the probability away from the label.

    "paper" (Stutz et al., ICCV 2021): 1 - tau on the label and tau / (K - 1) on every other class.
    "uniform" (Szegedy et al., CVPR 2016): (1 - tau) times the label plus tau / K on every class.
    Both are linear in y and so hold for mixed labels too.

    Args:
        y: int64 (B,), or probabilities (B, K).
        classes: K, at least 2.
        amount: tau in [0, 1].
        target: "paper" or "uniform".

    Returns:
        Probabilities (B, K).
    """
    probabilities = as_probabilities(y, classes)
    if target == "paper":
        return (1 - amount) * probabilities + amount / (classes - 1) * (1 - probabilities)
    return (1 - amount) * probabilities + amount / classes


def noisy(y: Tensor, classes: int, *, amount: float, generator: torch.Generator | None = None) -> Tensor:
    """Label noise: replace each label with probability `amount` by one drawn uniformly from all K classes.

    The draw may hit the true class, so the expected share of changed labels is amount * (K - 1) / K.

    Args:
        y: int64 (B,), or probabilities (B, K), whose replaced rows become one-hot.
        classes: K.
        amount: probability in [0, 1].
        generator: source of the draws, on the device of y.

    Returns:
        Labels in the form and dtype of y.
    """
    label = partial(torch.randint, classes, generator=generator, device=y.device)
    unit = partial(torch.rand, generator=generator, device=y.device)
    drawn = drawn_for_batch(label, y.shape[:1])
    replaced = drawn_for_batch(unit, y.shape[:1]) < amount
    if y.is_floating_point():
        return torch.where(replaced[:, None], F.one_hot(drawn, classes).to(y.dtype), y)
    return torch.where(replaced, drawn, y)
