"""Layers whose result depends on the whole batch or draws for it, in a batch that several processes share.

Inside `synchronised` batch norm normalises by the statistics of the whole batch, as torch's SyncBatchNorm does on
GPUs, and dropout draws its mask for the whole batch. Parameters, buffers and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from robustflat.errors import UserError
from robustflat.models.norms import ReBatchNorm
from robustflat.ranks import Ranks, current
from robustflat.rng import drawn_for_batch

_KNOWN = (_BatchNorm.forward, ReBatchNorm.forward)


@contextmanager
def synchronised(model: nn.Module, *, batch_norm: bool = True) -> Iterator[None]:
    """Inside, forward passes in training mode treat the batch as a share of one that all ranks work on together.

    All ranks must make the same passes in the same order, each with its share of the examples; shares may differ in
    size. A graph recorded inside can be differentiated outside, once (there is no second derivative). Without other
    ranks nothing changes. Dropout follows `rng.holding`: on a CPU its masks are those of a single process.

    Args:
        model: any network.
        batch_norm: whether batch norm uses the statistics of all shares; else each share has its own.

    Raises:
        UserError: for a batch norm or dropout of a kind whose computation is not known here.
    """
    changed: list[nn.Module] = []
    try:
        if current().size > 1:
            for layer in model.modules():
                forward = _replacement(layer, batch_norm)
                if forward is not None and "forward" not in layer.__dict__:
                    layer.forward = MethodType(forward, layer)  # a method, so that a copy of the layer has its own
                    changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _replacement(layer: nn.Module, batch_norm: bool) -> Any:
    if isinstance(layer, _BatchNorm) and batch_norm:
        if type(layer).forward not in _KNOWN:
            raise UserError(
                f"{type(layer).__name__} is a batch norm of its own kind, which cannot be synchronised between "
                "processes: trainer.sync_batch_norm=false normalises the share of each process by itself."
            )
        return _batch_norm
    if isinstance(layer, _DropoutNd) and layer.p > 0:
        if type(layer) is not nn.Dropout:
            raise UserError(f"{type(layer).__name__} cannot draw for several processes: use nn.Dropout or one process.")
        return _dropout
    return None


def _dropout(layer: nn.Dropout, input: Tensor) -> Tensor:
    if not layer.training:
        return input

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(1 - layer.p)

    return input * drawn_for_batch(draw, input.shape).div_(1 - layer.p)


def _batch_norm(layer: _BatchNorm, input: Tensor) -> Tensor:
    if not layer.training and layer.running_mean is not None:
        found: Tensor = type(layer).forward(layer, input)
        return found
    layer._check_input_dim(input)  # type: ignore[no-untyped-call]
    ranks = current()
    mean, variance, count = batch_statistics(input, ranks)
    if layer.training and layer.track_running_stats:
        _update(layer, mean, variance, count)
    weight = layer.scale if isinstance(layer, ReBatchNorm) else layer.weight
    output: Tensor = _Normalised.apply(input, weight, layer.bias, mean, variance, count, layer.eps)
    return output


@torch.no_grad()
def batch_statistics(input: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel (C,) of the features (B, C, ...) of all ranks, and the count, 0-dim.

    In at least float32; combined in float64 from each rank's own mean and variance, which loses no digits.
    """
    features = input.to(torch.promote_types(input.dtype, torch.float32))
    dims = [d for d in range(input.ndim) if d != 1]
    variance, mean = torch.var_mean(features, dim=dims, correction=0)
    own = torch.cat([mean.double(), variance.double(), mean.new_full((1,), input.numel() / input.shape[1]).double()])
    table = own.new_zeros(ranks.size, len(own))
    table[ranks.rank] = own
    ranks.sum_([table])
    means, variances = table[:, :-1].chunk(2, dim=1)
    counts = table[:, -1:]
    total = counts.sum()
    shared = (counts * means).sum(dim=0) / total
    spread = (counts * (variances + (means - shared).square())).sum(dim=0) / total
    return shared.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype)


@torch.no_grad()
def _update(layer: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Running statistics, as torch keeps them: the unbiased variance, and with momentum=None a plain average."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    factor = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    unbiased = variance * (count / (count - 1).clamp_min(1))
    layer.running_mean.mul_(1 - factor).add_(mean.to(layer.running_mean.dtype), alpha=factor)
    layer.running_var.mul_(1 - factor).add_(unbiased.to(layer.running_var.dtype), alpha=factor)


class _Normalised(torch.autograd.Function):
    """Scaled and shifted (x - mean) / sqrt(variance + eps), with mean and variance those of all ranks' x.

    With u = (x - mean) / sqrt(variance + eps) and g the gradient at the output, over all M numbers of a channel on
    all ranks, the gradient at x is weight / sqrt(variance + eps) * (g - sum(g) / M - u sum(g u) / M). Those at weight
    and bias are this rank's sums, as for any other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, variance, count)
        ctx.eps, ctx.bias_type = eps, None if bias is None else bias.dtype
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance, count = ctx.saved_tensors
        by_channel = partial(torch.reshape, shape=(1, -1, *[1] * (input.ndim - 2)))
        dims = [d for d in range(input.ndim) if d != 1]
        inverse = (variance + ctx.eps).rsqrt()
        g = gradient.to(mean.dtype)
        u = (input.to(mean.dtype) - by_channel(mean)) * by_channel(inverse)
        of_bias, of_weight = g.sum(dim=dims), (g * u).sum(dim=dims)
        sums = torch.stack([of_bias, of_weight])
        current().sum_([sums])
        sums /= count
        scale = inverse if weight is None else inverse * weight.to(mean.dtype)
        at_input = by_channel(scale) * (g - by_channel(sums[0]) - u * by_channel(sums[1]))
        return (
            at_input.to(input.dtype),
            of_weight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
            of_bias.to(ctx.bias_type) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )
