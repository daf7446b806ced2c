"""Transforms of torchvision wrapped as augmentations."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from robustflat.data.torchvision_transform import TorchvisionTransform
from robustflat.errors import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_fixed_transform_gives_what_torchvision_gives() -> None:
    x = torch.rand(4, 3, 16, 16)
    for per_image in (True, False):
        wrapped = TorchvisionTransform(v2.GaussianBlur(3, sigma=1.0), per_image=per_image)
        torch.testing.assert_close(wrapped(x, seeded()), v2.functional.gaussian_blur(x, [3, 3], [1.0, 1.0]))


def test_each_image_gets_its_own_parameters_or_all_the_same_as_asked() -> None:
    x = torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1)
    crop = v2.RandomResizedCrop(16, scale=(0.1, 0.9))
    own = TorchvisionTransform(crop)(x, seeded())
    shared = TorchvisionTransform(crop, per_image=False)(x, seeded())
    assert len(torch.unique(own.flatten(1), dim=0)) == 8
    assert len(torch.unique(shared.flatten(1), dim=0)) == 1


def test_the_global_generator_is_left_where_it_was_and_does_not_matter() -> None:
    x, wrapped = torch.rand(4, 3, 16, 16), TorchvisionTransform(v2.RandomErasing(p=1.0))
    state = torch.get_rng_state()
    first = wrapped(x, seeded())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, wrapped(x, seeded()))
    assert not torch.equal(first, wrapped(x, seeded(1)))


def test_the_global_generator_is_put_back_when_the_transform_fails() -> None:
    def failing(image: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        raise RuntimeError("broken")

    x, state = torch.rand(2, 3, 4, 4), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        TorchvisionTransform(failing)(x, seeded())
    assert torch.equal(state, torch.get_rng_state())


def test_uint8_results_are_brought_back_to_the_unit_interval() -> None:
    x = torch.randint(0, 256, (3, 3, 8, 8)) / 255
    chain = v2.Compose([v2.ToDtype(torch.uint8, scale=True), v2.RandomInvert(p=1.0)])
    torch.testing.assert_close(TorchvisionTransform(chain)(x, seeded()), 1 - x)


def test_results_are_clamped_to_the_unit_interval() -> None:
    out = TorchvisionTransform(v2.Normalize([0.5], [0.1]))(torch.rand(4, 1, 8, 8), seeded())
    assert float(out.min()) == 0.0
    assert float(out.max()) == 1.0


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (v2.CenterCrop(4), r"CenterCrop must keep the shape \(3, 8, 8\), but returned \(3, 4, 4\). Add a Resize"),
        (v2.ToPILImage(), r"ToPILImage must keep the shape \(3, 8, 8\), but returned Image"),
    ],
)
def test_results_of_another_shape_are_refused(transform: v2.Transform, text: str) -> None:
    with pytest.raises(UserError, match=text):
        TorchvisionTransform(transform)(torch.rand(2, 3, 8, 8), seeded())


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(UserError, match=r"transform must be callable, such as .* got 'RandomErasing'"):
        TorchvisionTransform("RandomErasing")  # type: ignore[arg-type]
