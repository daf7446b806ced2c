"""Differences are seen whatever weights hide them, and weights come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustflat.models.likeness import alike, answer, moved


class Hidden(nn.Module):
    """A branch of scale 0, and a variance."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.gate, self.power = nn.Parameter(torch.zeros(3, 1)), power
        self.register_buffer("variance", torch.full((), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3)) / self.variance.sqrt() + (self.gate.T * x.sum(3) ** self.power).sum(2)  # type: ignore[operator]


def test_answers_by_hand() -> None:
    x = torch.rand(2, 3, 1, 1)
    found = answer(nn.Flatten(), x)
    assert found is not None
    assert torch.equal(found[0], x.flatten(1))
    torch.testing.assert_close(found[1].flatten(1), x.flatten(1).softmax(1))
    with torch.inference_mode():
        assert alike(found, answer(nn.Flatten(), x), 0.0)


@pytest.mark.parametrize("network", [lambda x: x.detach(), lambda x: x.sum(), lambda x: x.flatten(1)[:, :, None].T[5]])
def test_what_gives_no_gradient_is_like_nothing(network: nn.Module) -> None:
    assert answer(network, torch.rand(2, 3, 1, 1)) is None
    assert not alike(None, None, 1.0)


def test_weights_of_zero_hide_nothing_and_all_come_back() -> None:
    one, other, x = Hidden(1), Hidden(2), torch.rand(1, 3, 1, 1)
    assert alike(answer(one, x), answer(other, x), 0.0)
    with moved(one), moved(other):
        assert not alike(answer(one, x), answer(other, x), 0.01)
        assert torch.equal(one.gate, other.gate)
        assert one.gate.unique().numel() == 3
        assert float(one.variance) > 0  # type: ignore[arg-type]
    assert not one.gate.any()
    assert torch.equal(one.variance, torch.full((), 1e-4))  # type: ignore[arg-type]
