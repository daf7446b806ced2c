"""Networks from elsewhere behind our contract."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from robustflat.errors import UserError
from robustflat.models.external import Wrapped

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class _TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((2, 3)), x


def test_a_torchvision_network_gets_standardised_images() -> None:
    network = torchvision.models.squeezenet1_1(num_classes=5).eval()
    model = Wrapped(network, classes=5, mean=MEAN, std=STD).eval()
    x = torch.rand(2, 3, 48, 48)
    expected = network(torchvision.transforms.functional.normalize(x, list(MEAN), list(STD)))
    torch.testing.assert_close(model(x), expected)
    assert model.classes == 5
    assert {k.partition(".")[0] for k in model.state_dict()} == {"network"}


def test_a_network_that_standardises_by_itself_gets_the_images_as_they_are() -> None:
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(Wrapped(nn.Flatten(), classes=4)(x), x.flatten(1))


def test_wrong_number_of_logits_is_refused() -> None:
    with pytest.raises(UserError, match=r"Flatten returns shape \(2, 4\) for 2 images, but classes=10"):
        Wrapped(nn.Flatten(), classes=10)(torch.rand(2, 1, 2, 2))


def test_several_outputs_are_refused() -> None:
    with pytest.raises(UserError, match="_TwoOutputs must return one tensor of logits, got tuple"):
        Wrapped(_TwoOutputs(), classes=3)(torch.rand(2, 3, 2, 2))


def test_wrong_channels_and_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"images of shape \(B, 3, H, W\)"):
        Wrapped(nn.Flatten(), classes=10, mean=MEAN, std=STD)(torch.rand(2, 1, 2, 2))
    with pytest.raises(UserError, match=r"images of shape \(B, 1, H, W\)"):
        Wrapped(nn.Flatten(), classes=10, channels=1)(torch.rand(2, 3, 2, 2))
    with pytest.raises(UserError, match="classes must lie in"):
        Wrapped(nn.Flatten(), classes=1)
