"""Colour jitter against torchvision's kernels, and the distribution of its draws."""

from __future__ import annotations

import colorsys

import pytest
import torch
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import functional as TF

from robustflat.data.colour_ops import shift_hue
from robustflat.data.jitter import ColorJitter
from robustflat.errors import UserError

KERNELS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.1), (1.5, 0.9, 2.0, 0.5), (0.3, 0.0, 0.0, 0.0)])
def test_jitter_equals_torchvision_image_by_image(
    channels: int, size: int, strengths: tuple[float, float, float, float]
) -> None:
    brightness, contrast, saturation, hue = strengths
    jitter = ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    x = torch.randint(0, 256, (24, channels, size, size)) / 255
    factors, order = jitter.draw(x, seeded())
    out = jitter(x, seeded())
    for i, image in enumerate(x):
        expected = image
        for kind in order[i].tolist():
            expected = KERNELS[kind](expected, float(factors[kind, i]))
        torch.testing.assert_close(out[i], expected, atol=0.1 / 255, rtol=0)


def test_hue_equals_the_standard_library() -> None:
    colours = torch.rand(1, 3, 10, 10)
    colours[..., 0] = 0.4  # grey pixels have no hue
    turned = shift_hue(colours, torch.tensor([0.3]))
    for before, after in zip(colours.flatten(2)[0].T.tolist(), turned.flatten(2)[0].T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), abs=1e-5)


def test_without_strength_nothing_changes() -> None:
    x = torch.rand(8, 3, 8, 8)
    assert torch.equal(ColorJitter()(x, seeded()), x)


def test_factors_are_uniform_between_their_ends() -> None:
    jitter = ColorJitter(brightness=0.4, contrast=2.0, saturation=1.0, hue=0.2)
    factors, _ = jitter.draw(torch.zeros(4000, 1, 1, 1), seeded())
    ends = [(0.6, 1.4), (0.0, 3.0), (0.0, 2.0), (-0.2, 0.2)]
    for drawn, (low, high) in zip(factors, ends, strict=True):
        assert kstest(drawn.numpy(), "uniform", args=(low, high - low)).pvalue > 1e-3


def test_all_24_orders_are_equally_likely() -> None:
    _, order = ColorJitter().draw(torch.zeros(4800, 1, 1, 1), seeded())
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(4800, 4))
    _, counts = torch.unique(order, dim=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"brightness": -0.1}, r"brightness must lie in \[0, inf\), got -0.1"),
        ({"contrast": float("inf")}, "contrast must lie in"),
        ({"saturation": float("nan")}, "saturation must lie in"),
        ({"hue": 0.6}, r"hue must lie in \[0, 0.5\], got 0.6. Half a turn"),
    ],
)
def test_impossible_strengths_are_refused(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        ColorJitter(**arguments)
