"""Which outputs go into one layer only, also where weights of 0 hide what goes around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.models.consumers import alone


class Around(nn.Module):
    """Batch norm of a convolution's output, and `gate` times something else made of that output."""

    def __init__(self, what: str, gate: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.what, self.gate = what, nn.Parameter(torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        other = {"nothing": 0.0, "itself": out, "square": out.square(), "after": self.norm(out)}[self.what]
        result: Tensor = (self.norm(out) + self.gate * other).mean((2, 3))
        return result


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize(
    ("what", "expected"), [("nothing", True), ("itself", False), ("square", False), ("after", True)]
)
def test_other_uses_of_an_output_are_noticed(what: str, expected: bool, gate: float) -> None:
    model = Around(what, gate).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert alone(model, torch.rand(2, 1, 4, 4), [("conv", "norm")]) is (what in ("nothing", "after"))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.conv._forward_hooks and not model.norm._forward_hooks
