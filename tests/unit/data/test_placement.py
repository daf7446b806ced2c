"""Crops, flips and holes against slow loops over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, chisquare
from torch import Tensor

from robustflat.data.placement import Cutout, Flip, PadCrop, PadResize, Rotate90
from robustflat.errors import UserError

GREY_LEVEL = 1 / 255
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 12, 20)]


def images(shape: tuple[int, int, int] = (3, 32, 32), count: int = 20) -> Tensor:
    return torch.randint(0, 256, (count, *shape)) / 255


def twins(seed: int = 0) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def assert_uniform(values: Tensor, count: int) -> None:
    """The integers `values` look like independent uniform draws from 0 .. count - 1."""
    assert int(values.min()) >= 0
    assert int(values.max()) < count
    assert chisquare(torch.bincount(values.flatten(), minlength=count).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("fill", [0.0, 0.6, "per channel"])
def test_pad_crop_equals_numpy_padding_and_slicing(
    shape: tuple[int, int, int], padding: int, fill: float | str
) -> None:
    colour = [0.1 * (channel + 1) for channel in range(shape[0])] if fill == "per channel" else fill
    assert not isinstance(colour, str)
    crop, x, (a, b) = PadCrop(padding=padding, fill=colour), images(shape), twins()
    rows, columns = crop.draw(x, a).tolist()
    result = crop(x, b).numpy()
    for image, out, row, column in zip(x.numpy(), result, rows, columns, strict=True):
        margins = (padding, padding)
        colours = np.broadcast_to(colour, shape[0])
        padded = np.stack(
            [np.pad(c, (margins, margins), constant_values=v) for c, v in zip(image, colours, strict=True)]
        )
        assert np.array_equal(out, padded[:, row : row + shape[1], column : column + shape[2]])


def test_pad_crop_fills_uint8_images_with_the_grey_level_of_the_colour() -> None:
    x = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    out = PadCrop(padding=4, fill=(125 / 255, 122 / 255, 113 / 255))(x, twins()[0])
    assert [set(out[:, c].flatten().tolist()) for c in range(3)] == [{0, 125}, {0, 122}, {0, 113}]


def test_pad_crop_windows_are_uniform_and_rows_independent_of_columns() -> None:
    rows, columns = PadCrop(padding=4).draw(torch.zeros(8100, 1, 8, 8), twins()[0])
    assert_uniform(rows * 9 + columns, 81)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_pad_resize_equals_padding_and_bilinear_interpolation(shape: tuple[int, int, int], fill: float) -> None:
    resize, x, (a, b) = PadResize(max_pad=4, fill=fill), images(shape), twins()
    drawn = resize.draw(x, a).T.tolist()
    result = resize(x, b)
    for image, out, (top, bottom, left, right) in zip(x, result, drawn, strict=True):
        padded = F.pad(image, (left, right, top, bottom), value=fill).unsqueeze(0)
        expected = F.interpolate(padded, shape[1:], mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(out, expected, atol=GREY_LEVEL / 100, rtol=0)


def test_pad_resize_without_padding_is_the_identity() -> None:
    x = images((3, 30, 21))
    torch.testing.assert_close(PadResize(max_pad=0)(x, twins()[0]), x)


def test_pad_resize_draws_each_side_uniformly_and_on_its_own() -> None:
    top, bottom, left, right = PadResize(max_pad=4).draw(torch.zeros(12500, 1, 8, 8), twins()[0])
    assert_uniform(((top * 5 + bottom) * 5 + left) * 5 + right, 625)


def test_flip_mirrors_the_drawn_images_only() -> None:
    flip, x, (a, b) = Flip(), images(), twins()
    mirrored = flip.draw(x, a).tolist()
    assert len(set(mirrored)) == 2
    for image, out, turned in zip(x.numpy(), flip(x, b).numpy(), mirrored, strict=True):
        assert np.array_equal(out, image[:, :, ::-1] if turned else image)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, 5000)])
def test_flip_with_probability_zero_or_one_is_certain(probability: float, share: int) -> None:
    assert int(Flip(probability=probability).draw(torch.zeros(5000, 1, 2, 2), twins()[0]).sum()) == share


def test_flip_mirrors_with_its_probability() -> None:
    count = int(Flip(probability=0.3).draw(torch.zeros(5000, 1, 2, 2), twins()[0]).sum())
    assert binomtest(count, 5000, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 4, 5, 8])
def test_cutout_equals_the_clipped_square_of_its_authors(shape: tuple[int, int, int], size: int) -> None:
    colour = [0.1 * (channel + 1) for channel in range(shape[0])]
    cutout, x, (a, b) = Cutout(size=size, fill=colour), images(shape), twins()
    centres = cutout.draw(x, a).T.tolist()
    for image, out, (row, column) in zip(x.numpy(), cutout(x, b).numpy(), centres, strict=True):
        expected = image.copy()
        top, left = row - size // 2, column - size // 2
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = np.reshape(colour, (-1, 1, 1))
        assert np.array_equal(out, expected)


def test_cutout_centres_are_uniform_over_the_pixels() -> None:
    rows, columns = Cutout(size=2).draw(torch.zeros(9600, 1, 8, 12), twins()[0])
    assert_uniform(rows * 12 + columns, 96)


def test_rotate90_turns_counter_clockwise_and_returns_how_often() -> None:
    x = images()
    turned, k = Rotate90().rotate(x, twins()[0])
    assert set(k.tolist()) == {0, 1, 2, 3}
    for image, out, turns in zip(x.numpy(), turned.numpy(), k.tolist(), strict=True):
        assert np.array_equal(out, np.rot90(image, turns, (1, 2)))


def test_rotate90_turns_are_uniform_and_labels_are_integers() -> None:
    turns = Rotate90().draw(torch.zeros(4000, 1, 2, 2), twins()[0])
    assert turns.dtype == torch.int64
    assert_uniform(turns, 4)


def test_rotate90_called_as_an_augmentation_leaves_out_the_labels() -> None:
    x, (a, b) = images(), twins()
    assert torch.equal(Rotate90()(x, a), Rotate90().rotate(x, b)[0])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PadCrop(padding=-1), r"padding must lie in \[0, inf\), got -1"),
        (lambda: PadCrop(fill=125), r"fill must lie in \[0, 1\], got 125.0. Write 125/255 as 0.4902"),
        (lambda: PadCrop(fill=[0.1, 2.0]), r"fill must lie in \[0, 1\], got 2.0"),
        (lambda: PadCrop(fill=[]), r"fill must be a number or one number per channel, in \[0, 1\], got \[\]"),
        (lambda: PadCrop(fill="0.5"), "fill must be a number or one number per channel"),  # type: ignore[arg-type]
        (lambda: PadCrop(fill=["a"]), "fill must be a number or one number per channel"),  # type: ignore[list-item]
        (lambda: PadResize(max_pad=-1), "max_pad must lie in"),
        (lambda: Flip(probability=1.5), r"probability must lie in \[0, 1\], got 1.5"),
        (lambda: Flip(probability=float("nan")), r"probability must lie in \[0, 1\], got nan"),
        (lambda: Cutout(size=0), "size must lie in"),
    ],
)
def test_impossible_parameters_are_refused(make: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (PadCrop(padding=9), "PadCrop: padding must be at most 8 for images of 8 x 9 pixels, got 9"),
        (PadResize(max_pad=9), "PadResize: max_pad must be at most 8"),
        (Cutout(size=16), "Cutout: size must be at most 8 for images of 8 x 9 pixels, got 16. Set size to 8 or less"),
        (PadCrop(padding=1, fill=(0.1, 0.2)), "fill must have 1 or 3 numbers, one per channel, got 2"),
        (Rotate90(), "Rotate90 needs square images, got 8 x 9 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(entry: PadCrop, text: str) -> None:
    with pytest.raises(UserError, match=text):
        entry(images((3, 8, 9)), twins()[0])
