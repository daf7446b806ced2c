"""Batch-norm statistics for displaced weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustflat.errors import UserError
from robustflat.models.precision import exact_float32
from robustflat.types import Batch


def statistic_layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def recalibrated(model: nn.Module, batches: Sequence[Batch]) -> Iterator[None]:
    """Inside, running statistics are the plain averages over clean `batches` of each one's, at the present weights.

    Everything but the batch norms runs in the mode it is in. Afterwards statistics, momentum and mode are those
    found, bit for bit.

    Raises:
        UserError: if the model has no batch norm with running statistics, or a batch is too small to have any.
    """
    layers = statistic_layers(model)
    if not layers:
        raise UserError(
            f"batch_norm='recalibrate' needs batch-norm layers with running statistics; {type(model).__name__} "
            f"has none. Leave batch_norm at its default."
        )
    found = [
        (layer, layer.momentum, layer.training, [b.clone() for b in layer.buffers(recurse=False)]) for layer in layers
    ]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's sign for a plain average
            layer.train()
        with torch.no_grad():
            for batch in batches:
                with exact_float32(batch.x.device):  # losses at these statistics are compared, as exactly
                    _pass(model, batch)
        for layer, _, training, _ in found:
            layer.train(training)
        yield
    finally:
        for layer, momentum, training, buffers in found:
            layer.momentum = momentum
            layer.train(training)
            for buffer, before in zip(layer.buffers(recurse=False), buffers, strict=True):
                buffer.copy_(before)


def _pass(model: nn.Module, batch: Batch) -> None:
    try:
        model(batch.x)
    except ValueError as error:
        if len(batch.y) > 1:
            raise
        raise UserError(
            f"batch_norm='recalibrate' takes statistics of every batch, and one has a single example: {error}. Choose "
            f"a batch size that leaves none."
        ) from error
