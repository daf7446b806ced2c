"""Full float32 arithmetic for the passes that decide a number, whatever the search before them used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 inside, settings as found after.

    TF32 keeps 10 bits of mantissa, so convolutions on a GPU (where it is torch's default) blur loss differences
    of 1e-3, the size of a small flatness. Search with it, judge without it.
    """
    cudnn = torch.backends.cudnn
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
    found = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, found, strict=True):
            switch.fp32_precision = precision


def precision_of(model: nn.Module) -> str:
    """Name of the floating-point type of a model's parameters: "fp32", "fp64", "bf16", "fp16" or "mixed"."""
    names = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return names.get(types.pop(), "mixed") if len(types) == 1 else "mixed"


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Floating-point type of the first parameter or buffer; float32 for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
