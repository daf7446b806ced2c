"""Optimizers built from a model: parameter groups, ranges checked, the fast kernels where they exist.

In a config: `{_target_: robustflat.training.optimizers.sgd, _partial_: true, lr: 0.05}`; the trainer supplies
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from robustflat.errors import UserError, require_range
from robustflat.models.modes import is_norm_layer


def sgd(
    model: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    decay_norm_and_bias: bool = True,
) -> Optimizer:
    """Stochastic gradient descent; the defaults are those of the paper's experiments.

    Args:
        model: its trainable parameters are optimised.
        lr: learning rate, > 0.
        momentum: in [0, 1).
        nesterov: look-ahead momentum; needs momentum > 0.
        weight_decay: >= 0, added to the gradient as weight_decay * w.
        decay_norm_and_bias: whether it also acts on biases and on normalisation layers.

    Raises:
        UserError: for values outside these ranges, or a model without trainable parameters.
    """
    require_range("momentum", momentum, low=0, high=1, high_open=True)
    if nesterov and momentum == 0:
        raise UserError("nesterov needs momentum > 0, got momentum=0. Set nesterov=false, or a momentum such as 0.9.")
    groups = _groups(model, lr, weight_decay, decay_norm_and_bias)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=_fused(model))


def adam(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 5e-4,
    decay_norm_and_bias: bool = True,
) -> Optimizer:
    """Adam (Kingma and Ba, ICLR 2015) with weight decay added to the gradient.

    Args:
        model: its trainable parameters are optimised.
        lr: learning rate, > 0 (the paper's row uses 0.1, like its SGD rows of that size).
        betas: two decay rates in [0, 1).
        eps: > 0.
        weight_decay, decay_norm_and_bias: see `sgd`.

    Raises:
        UserError: for values outside these ranges, or a model without trainable parameters.
    """
    first, second = _checked_betas(betas, eps)
    groups = _groups(model, lr, weight_decay, decay_norm_and_bias)
    return torch.optim.Adam(groups, lr=lr, betas=(first, second), eps=eps, fused=_fused(model))


def adamw(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    decay_norm_and_bias: bool = True,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019); arguments as for `adam`.

    Raises:
        UserError: for values outside the ranges, or a model without trainable parameters.
    """
    first, second = _checked_betas(betas, eps)
    groups = _groups(model, lr, weight_decay, decay_norm_and_bias)
    return torch.optim.AdamW(groups, lr=lr, betas=(first, second), eps=eps, fused=_fused(model))


def _checked_betas(betas: Sequence[float], eps: float) -> tuple[float, float]:
    require_range("eps", eps, low=0, low_open=True)
    if len(betas) != 2:
        raise UserError(f"betas must be two numbers in [0, 1), got {list(betas)}.")
    for beta in betas:
        require_range("betas", beta, low=0, high=1, high_open=True)
    return float(betas[0]), float(betas[1])


def _groups(model: nn.Module, lr: float, weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Parameter groups of a model: one, or two where normalisation and biases are not decayed."""
    require_range("lr", lr, low=0, low_open=True)
    require_range("weight_decay", weight_decay, low=0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("the model has no trainable parameters: there is nothing to optimise.")
    if decay_norm_and_bias:
        return [{"params": trainable, "weight_decay": weight_decay}]
    exempt = {id(p) for module in model.modules() if is_norm_layer(module) for p in module.parameters()}
    exempt |= {id(p) for name, p in model.named_parameters() if "bias" in name.rpartition(".")[2]}
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fused(model: nn.Module) -> bool | None:
    """One kernel per step where all parameters are on a GPU; otherwise torch's own choice."""
    return True if all(p.is_cuda for p in model.parameters()) else None
