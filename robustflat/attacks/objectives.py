"""Per-example objectives of logits, all to be maximised by an attack.

Every objective takes logits (B, K) and labels y and returns (B,). The labels hold everything that belongs to
one example, so that wrappers may repeat or select examples without knowing the objective:

* int64 (B,): true labels;
* float (B, K): probabilities, for mixed or smoothed labels and for the clean prediction of TRADES;
* int64 (B, 2): true label and target class, made by `with_target`, for the targeted objectives.

Logits in half precision are raised to float32 first: differences of large logits are what an attack lives on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from robustflat.errors import UserError, require_one_of
from robustflat.types import Objective


def labels_of(y: Tensor) -> Tensor:
    """True labels int64 (B,) of any form of y: themselves, the most probable class, or the first of a pair."""
    if y.ndim == 1:
        return y
    return y.argmax(dim=1) if y.is_floating_point() else y[:, 0]


def with_target(y: Tensor, target: Tensor) -> Tensor:
    """Pairs (true label, target class), int64 (B, 2), from y in any form and target classes (B,)."""
    return torch.stack([labels_of(y), target], dim=1)


def predicted_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is not that of the label, bool (B,)."""
    return logits.argmax(dim=1) != labels_of(y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats, (B,): -log p_y, or -sum_k y_k log p_k where y holds probabilities (B, K)."""
    logits = _at_least_float32(logits)
    if y.is_floating_point():
        return -(y.to(logits.dtype) * F.log_softmax(logits, dim=1)).sum(dim=1)
    return F.cross_entropy(logits, labels_of(y), reduction="none")


def kl_divergence(logits: Tensor, y: Tensor) -> Tensor:
    """KL(y || p) = sum_k y_k (log y_k - log p_k) in nats, (B,), with p = softmax(logits) and 0 log 0 = 0.

    TRADES (Zhang et al., ICML 2019) maximises it with y the clean prediction. Both logarithms are taken in the
    log domain, so vanishing probabilities give no NaN. Labels that are classes are one-hot distributions, for
    which the divergence is the cross-entropy.
    """
    if not y.is_floating_point():
        return cross_entropy(logits, y)
    logits = _at_least_float32(logits)
    y = y.to(logits.dtype)
    log_y = y.clamp_min(torch.finfo(y.dtype).tiny).log()
    return (y * (log_y - F.log_softmax(logits, dim=1))).sum(dim=1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y, (B,): positive exactly where the prediction is wrong (Carlini and Wagner, 2017).

    Raises:
        UserError: with fewer than two classes.
    """
    logits = _at_least_float32(logits)
    _require_classes(logits)
    label = labels_of(y)[:, None]
    others = logits.scatter(1, label, -torch.inf)
    return others.max(dim=1).values - logits.gather(1, label)[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, Eq. 6), (B,).

    margin / (z_(1) - z_(3)), with z_(i) the i-th largest logit: neither a shift nor a positive factor of the
    logits changes it. Of two logits only the sign of their difference is left by that, which has no gradient,
    so with two classes it is the margin itself.

    Raises:
        UserError: with fewer than two classes.
    """
    value = margin(logits, y)
    if logits.shape[1] < 3:
        return value
    top = _at_least_float32(logits).topk(3, dim=1).values
    return value / (top[:, 0] - top[:, 2]).clamp_min(_SMALLEST_RANGE)


def margin_to_target(logits: Tensor, y: Tensor) -> Tensor:
    """z_t - z_y, (B,), for pairs y = (true label, target t) made by `with_target` (Gowal et al., 2019).

    Raises:
        UserError: if y holds no targets.
    """
    logits = _at_least_float32(logits)
    if y.is_floating_point() or y.shape[1:] != (2,):
        raise UserError(
            f"a targeted objective needs pairs (label, target), int64 of shape (B, 2), got {y.dtype} of shape "
            f"{tuple(y.shape)}. Make them with with_target(y, target)."
        )
    both = logits.gather(1, y)
    return both[:, 1] - both[:, 0]


def dlr_targeted(logits: Tensor, y: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce and Hein, ICML 2020, Eq. 7), (B,), for pairs y.

    (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2). With three classes the last term is z_(3); with two there is
    no division, as in `dlr`.

    Raises:
        UserError: if y holds no targets.
    """
    value = margin_to_target(logits, y)
    if logits.shape[1] < 3:
        return value
    top = _at_least_float32(logits).topk(min(4, logits.shape[1]), dim=1).values
    return value / (top[:, 0] - top[:, 2:].mean(dim=1)).clamp_min(_SMALLEST_RANGE)


class Targeted:
    """The negative of an objective, for attacks that want the label they are given: y *is* the target.

    `Targeted(cross_entropy)` is largest where the model is surest of y.

    Args:
        objective: the untargeted objective, (logits (B, K), y) -> (B,).
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """-objective(logits, y), (B,)."""
        return -self.objective(logits, y)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "cross_entropy": cross_entropy,
        "kl_divergence": kl_divergence,
        "margin": margin,
        "dlr": dlr,
        "margin_to_target": margin_to_target,
        "dlr_targeted": dlr_targeted,
    }
)
"""Name in a config -> objective."""


def objective_by_name(name: str) -> Objective:
    """The objective called `name` in configs.

    Raises:
        UserError: with the allowed names and the closest one.
    """
    require_one_of("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


# Keeps the ratio finite where all logits are equal; far below any range that float32 logits can resolve.
_SMALLEST_RANGE = 1e-12


def _at_least_float32(logits: Tensor) -> Tensor:
    """Logits in their own precision if that is float32 or better, otherwise in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _require_classes(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise UserError(f"a margin between classes needs at least 2 classes, got {logits.shape[1]}.")
