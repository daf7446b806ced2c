"""The gradient of a loss by the weights, wherever a rule takes it: averaged over the processes that share the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.ranks import current
from robustflat.types import LossTerms, Weights


def backward(total: Tensor, model: nn.Module) -> None:
    """Add the gradient of a loss to `p.grad` of every trainable parameter of the model that it depends on.

    On several ranks, each with the mean loss over its share of a batch, shares being of equal size, it is the gradient
    of the mean over the batch, the same on all ranks. A gradient rule must use this instead of `total.backward()`.

    Args:
        total: the loss, 0-dim.
        model: whose weights are meant.
    """
    ranks = current()
    if ranks.size == 1:
        total.backward()  # type: ignore[no-untyped-call]
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    for (p, _), g in zip(pairs, ranks.means([g for _, g in pairs]), strict=True):
        p.grad = g if p.grad is None else p.grad + g


def loss_and_gradient(model: nn.Module, names: list[str], score: Callable[[], LossTerms]) -> tuple[Tensor, Weights]:
    """Total loss, 0-dim and detached, and its gradient by the named parameters; no `p.grad` changes.

    On several ranks both are those of the mean over the whole batch; see `backward`.

    Args:
        model: the network that `score` scores.
        names: parameters of the model; the gradient of one that the loss does not depend on is zero.
        score: computes the loss.

    Raises:
        UserError: if the loss depends on none of the parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = [parameters[name] for name in names]
    terms = score()
    if not terms.total.requires_grad:
        raise UserError("the loss does not depend on the model's weights, so there is no direction to perturb them in.")
    found = torch.autograd.grad(terms.total, chosen, allow_unused=True)
    slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, found, strict=True)]
    total, *slopes = current().means([terms.total.detach(), *slopes])
    return total, dict(zip(names, slopes, strict=True))
