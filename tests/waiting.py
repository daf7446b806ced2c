"""Refuses, on a CPU, what would make the host wait for a GPU."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import robustflat.attacks

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.equal,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.argwhere, aten.repeat_interleave, aten.bincount,
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masked = packet in {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_} and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in WAITING or masked:
            raise AssertionError(f"{packet} would wait for the device")
        return func(*args, **(kwargs or {}))


def without_checks_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks of images and labels that attacks make on a CPU only."""
    for module in pkgutil.iter_modules(robustflat.attacks.__path__, "robustflat.attacks."):
        for check in ("check_labels_on_cpu", "check_box_on_cpu"):
            if hasattr(importlib.import_module(module.name), check):
                monkeypatch.setattr(f"{module.name}.{check}", lambda *_: None)
