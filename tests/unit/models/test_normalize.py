"""Normalize: formula, state dict, dtype, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from robustflat.errors import UserError
from robustflat.models.normalize import Normalize

MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.25, 1.0)


def test_each_channel_is_shifted_and_scaled_by_its_own_constants() -> None:
    x = torch.rand(4, 3, 5, 6)
    y = Normalize(MEAN, STD)(x)
    for c in range(3):
        torch.testing.assert_close(y[:, c], (x[:, c] - MEAN[c]) / STD[c])


def test_without_constants_images_pass_untouched() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert Normalize(None, None, channels=3)(x) is x


def test_constants_are_not_in_the_state_dict_but_follow_the_dtype() -> None:
    layer = Normalize(MEAN, STD)
    assert list(layer.state_dict()) == []
    assert list(layer.parameters()) == []
    assert layer.double().mean.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert Normalize(MEAN, STD)(torch.rand(2, 3, 4, 4, dtype=dtype)).dtype == dtype


def test_printing_shows_the_constants() -> None:
    assert "mean=(0.1, 0.5, 0.9), std=(0.2, 0.25, 1)" in repr(Normalize(MEAN, STD))
    assert "channels=1" in repr(Normalize(None, None, channels=1))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 4, 4, 3), (3, 4, 4)])
def test_wrong_number_of_channels_is_refused(channels: int | None, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"images of shape \(B, 3, H, W\), got .*in_channels"):
        Normalize(MEAN, STD, channels=channels)(torch.rand(shape))


def test_flat_images_are_refused_even_without_constants() -> None:
    with pytest.raises(UserError, match=r"\(B, C, H, W\), got \(2, 784\)"):
        Normalize(None, None)(torch.rand(2, 784))


def test_uint8_images_are_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"torch.uint8. Convert uint8 by x.float\(\) / 255"):
        Normalize(MEAN, STD)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_mean_without_std_is_refused() -> None:
    with pytest.raises(UserError, match="mean and std belong together"):
        Normalize(MEAN, None)


def test_lengths_must_agree_with_each_other_and_with_the_channels() -> None:
    with pytest.raises(UserError, match="got 3 and 1 numbers for 3 channel"):
        Normalize(MEAN, (0.2,))
    with pytest.raises(UserError, match="got 3 and 3 numbers for 1 channel"):
        Normalize(MEAN, STD, channels=1)


def test_zero_std_is_refused() -> None:
    with pytest.raises(UserError, match=r"std must lie in \(0, inf\), got 0"):
        Normalize(MEAN, (0.2, 0.0, 0.2))
