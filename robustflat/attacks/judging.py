"""What all attacks share around their search: a model held still, and how results are judged and compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustflat.attacks.inputs import check_labels_on_cpu
from robustflat.attacks.objectives import Targeted, cross_entropy, predicted_wrong
from robustflat.errors import UserError
from robustflat.models.modes import evaluating, frozen
from robustflat.types import Attack, Forward, Found, Objective

KEEP = ("best", "fooled", "last")
"""Which of several candidates per example: largest value; fooled ones first, then largest value; the last."""


@contextmanager
def held_still(forward: Forward) -> Iterator[None]:
    """Inside, a module is in eval mode with frozen weights, then as found; other callables are left alone."""
    if isinstance(forward, nn.Module):
        with frozen(forward), evaluating(forward):
            yield
    else:
        yield


def own_objective(attack: Attack) -> Objective:
    """The objective that an attack uses when the call names none: its attribute, or cross-entropy."""
    objective: Objective = getattr(attack, "objective", cross_entropy)
    return objective


def is_targeted(attack: Attack) -> bool:
    """Whether the labels given to an attack are the classes it tries to reach."""
    return bool(getattr(attack, "targeted", False))


def maximised(objective: Objective, targeted: bool) -> Objective:
    """The objective as the search sees it: its negative where y holds targets."""
    return Targeted(objective) if targeted else objective


def succeeded(logits: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """Whether an attack reached its end, bool (B,): another class than y, or y itself if that is the target.

    Logits that are not finite are no success.
    """
    wrong = predicted_wrong(logits, y)
    return (~wrong if targeted else wrong) & logits.isfinite().all(dim=1)


def judge(forward: Forward, x_adv: Tensor, y: Tensor, objective: Objective, *, targeted: bool = False) -> Found:
    """Value and success of given images under a model held still: one forward pass, no gradient."""
    if x_adv.shape[0] == 0:
        return nothing_found(x_adv)
    with held_still(forward):
        return judge_as_is(forward, x_adv, y, objective, targeted=targeted)


@torch.no_grad()
def judge_as_is(forward: Forward, x_adv: Tensor, y: Tensor, objective: Objective, *, targeted: bool = False) -> Found:
    """As `judge`, for a caller that already holds the model still and has at least one image."""
    logits = forward(x_adv)
    check_labels_on_cpu(logits, y)
    value = maximised(objective, targeted)(logits, y)
    return Found(x_adv, value, succeeded(logits, y, targeted))


def require_values(value: Tensor, y: Tensor) -> None:
    """Refuse an objective that is not one number per example, or that no gradient can flow through.

    Raises:
        UserError: saying which, and the likely reason.
    """
    if value.shape != y.shape[:1]:
        raise UserError(
            f"an objective must return one value per example, shape ({len(y)},), got {tuple(value.shape)}. "
            "Does it take the mean over the batch?"
        )
    if not value.requires_grad:
        raise UserError(
            "the objective cannot be differentiated with respect to the images. Does the model run under "
            "torch.no_grad() or detach its input? A gradient attack needs a differentiable model."
        )


def nothing_found(x: Tensor) -> Found:
    """Result of an attack on an empty batch; the model is not asked."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return Found(x.clone(), x.new_zeros(0, dtype=dtype), x.new_zeros(0, dtype=torch.bool))


def choose(take: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` where take (B,) holds, `other` elsewhere; for tensors (B, ...)."""
    return torch.where(take.view(-1, *[1] * (one.ndim - 1)), one, other)


def select(take: Tensor, one: Found, other: Found) -> Found:
    """Per example the result `one` where take (B,) holds, `other` elsewhere."""
    return Found(*(choose(take, a, b) for a, b in zip(one, other, strict=True)))


def improves(new: Found, old: Found, keep: str) -> Tensor:
    """Whether `new` replaces `old`, bool (B,), by the rule `keep`; ties keep the old one, not-a-number never stays."""
    larger = (new.value > old.value) | (old.value.isnan() & ~new.value.isnan())
    if keep == "last":
        return torch.ones_like(larger)
    if keep == "fooled":
        return torch.where(new.fooled == old.fooled, larger, new.fooled)
    return larger
