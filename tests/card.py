"""A card without values, on a CPU: mixing its tensors with those of the CPU fails as it does on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"
aten = torch.ops.aten


class Card(TorchDispatchMode):
    """Inside, tensors on torch's device without values can be read, and brought to the CPU.

    They hold ones (yes), but of several things none holds, and the largest number is the first.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        if args and isinstance(args[0], Tensor) and args[0].device.type == DEVICE:
            if packet is aten._local_scalar_dense:
                return getattr(args[0], "value", torch.ones((), dtype=args[0].dtype).item())
            if packet in {aten.equal, aten.allclose}:
                return True
            if packet is aten.nonzero:
                return args[0].new_ones(len(args[0]), args[0].ndim, dtype=torch.int64)
            if packet is aten._to_copy and kwargs.get("device") == torch.device("cpu"):
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if packet in {aten.any, aten.argmax} or (packet is aten.sum and args[0].dtype == torch.bool):
                result = func(*args, **kwargs)
                result.value = 0
                return result
        return func(*args, **kwargs)


def plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the card what torch does not have for it: autocast, and random streams, which live on the CPU instead."""

    class OnCpu(torch.Generator):
        def __new__(cls, device: object = None) -> OnCpu:
            return super().__new__(cls, "cpu")

    monkeypatch.setattr(torch, "Generator", OnCpu)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
