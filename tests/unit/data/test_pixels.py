"""Pixels by position, and changes of chosen images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustflat.data.pixels import change_chosen, fill_colour, take_pixels


def test_pixels_are_taken_from_every_channel_of_their_own_image() -> None:
    x, index = torch.rand(3, 2, 4, 5), torch.randint(0, 20, (3, 6, 7))
    out = take_pixels(x, index)
    for i in range(3):
        for row in range(6):
            for column in range(7):
                source = divmod(int(index[i, row, column]), 5)
                assert torch.equal(out[i, :, row, column], x[i, :, source[0], source[1]])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("chosen", [[True, False, True], [False] * 3, [True] * 3])
def test_only_chosen_images_change_and_keep_their_parameters(packed: bool, chosen: list[bool]) -> None:
    x, amounts = torch.rand(3, 1, 2, 2), torch.tensor([1.0, 2.0, 3.0])

    def add(images: Tensor, amount: Tensor) -> Tensor:
        return images + amount.view(-1, 1, 1, 1)

    before = x.clone()
    out = change_chosen(x, torch.tensor(chosen), add, amounts, packed=packed)
    expected = [image + amount if c else image for image, amount, c in zip(x, amounts, chosen, strict=True)]
    assert torch.equal(out, torch.stack(expected))
    assert torch.equal(x, before)


def test_one_fill_value_serves_all_channels_and_scaling_rounds_to_levels() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert fill_colour((0.5,), x).flatten().tolist() == [0.5]
    assert fill_colour((0.1, 0.2, 0.3), x, scale=255).flatten().tolist() == [26.0, 51.0, 76.0]
    assert fill_colour((1.0,), x.to(torch.uint8)).flatten().tolist() == [255]
