"""Full float32 inside, settings as found after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustflat.models.precision import device_of, dtype_of, exact_float32, precision_of


def test_tf32_and_autocast_are_off_inside_and_as_found_after_also_after_an_error() -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    a = torch.rand(4, 4)
    with pytest.raises(RuntimeError, match="stop"), torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_float32(torch.device("cpu")):
            assert [switch.fp32_precision for switch in switches] == ["ieee"] * 3
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
        with exact_float32(torch.device("cpu")):
            raise RuntimeError("stop")
    assert [switch.fp32_precision for switch in switches] == before


def test_a_models_type_and_device() -> None:
    assert precision_of(nn.Linear(2, 2)) == "fp32"
    assert precision_of(nn.Linear(2, 2).double()) == "fp64"
    assert precision_of(nn.Linear(2, 2).bfloat16()) == "bf16"
    assert precision_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())) == "mixed"
    assert precision_of(nn.Flatten()) == "mixed"
    assert (device_of(nn.Flatten()).type, dtype_of(nn.Flatten())) == ("cpu", torch.float32)
    assert dtype_of(nn.BatchNorm2d(2, affine=False).double()) == torch.float64
