"""Which outputs go into one layer only, and which inputs may be overwritten, whatever hides it from the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.models.consumers import alone, overwritable


class Around(nn.Module):
    """Batch norm of a convolution's output, and `gate` times something else made of that output or of its weights."""

    def __init__(self, what: str, gate: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.second, self.other = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.what, self.gate = what, nn.Parameter(torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        other = {
            "nothing": lambda: 0.0,
            "itself": lambda: out,
            "square": lambda: out.square(),
            "after": lambda: self.norm(out),
            "normalised elsewhere": lambda: self.other(self.second(out)),
            "sign": lambda: (out > 0).float(),
            "a view": lambda: out.flatten(1).sum(),
            "weights": lambda: nn.functional.conv2d(x, self.conv.weight),
            "scale": lambda: self.norm.weight.sum(),
            "without its hooks": lambda: self.conv.forward(x),
        }[self.what]()
        result: Tensor = (self.norm(out) + self.gate * other).mean((2, 3))
        return result


OTHERS = ("itself", "square", "normalised elsewhere", "sign", "a view", "weights", "scale", "without its hooks")


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("what", ["nothing", "after", *OTHERS])
def test_other_uses_of_an_output_or_its_weights_are_noticed(what: str, gate: float) -> None:
    model = Around(what, gate).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = [("conv", "norm")] + [("second", "other")] * (what == "normalised elsewhere")
    assert ("conv" in alone(model, torch.rand(2, 1, 4, 4), pairs)) is (what not in OTHERS)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Rectifies(nn.Module):
    """A ReLU of numbers that are all positive, so that overwriting them changes nothing on these images."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.relu, self.what = nn.ReLU(), what
        self.weight = nn.Parameter(torch.rand(3) + 1)

    def forward(self, x: Tensor) -> Tensor:
        before = 1 + x
        part = before[:, :, 1:] if self.what == "a view" else before
        taken = {"weights": self.weight, "images": x}.get(self.what, part)
        after: Tensor = self.relu(taken)
        return {
            "nothing": lambda: after.sum((2, 3)),
            "added": lambda: (after + before).sum((2, 3)),
            "a view": lambda: after.sum((2, 3)) + before.sum((2, 3)),
            "weights": lambda: x.sum((2, 3)) * after,
            "images": lambda: after.sum((2, 3)),
        }[self.what]()


@pytest.mark.parametrize("what", ["nothing", "added", "a view", "weights", "images"])
def test_inputs_that_are_read_later_are_not_overwritten(what: str) -> None:
    model = Rectifies(what).eval()
    found = overwritable([model.relu], model, torch.rand(2, 3, 4, 4))
    assert found == ([model.relu] if what == "nothing" else [])
    assert not model.relu._forward_hooks and not model.relu._forward_pre_hooks
